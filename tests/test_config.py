"""The gateway's configuration: flags over variables over the file, and errors that name the setting."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from ares import variables
from ares.config import ConfigError, GatewayConfig, load

ROOT = Path(__file__).parents[1]
MINIMAL = {"model": "m", "workers": ["http://a"]}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("ARES_"):
            monkeypatch.delenv(name)


def file(folder: Path, text: str) -> Path:
    path = folder / "gateway.yaml"
    path.write_text(text)
    return path


def test_defaults() -> None:
    config = load(**MINIMAL)
    assert (config.host, config.port, config.preset) == ("127.0.0.1", 8000, "ares")
    assert config.admin_key is None
    assert config.handover_timeout_s < 30


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path, "model: file\nworkers: [http://file]\nport: 1\nhost: file\n")
    monkeypatch.setenv("ARES_PORT", "2")
    monkeypatch.setenv("ARES_HOST", "variable")
    config = load(path, port=3)
    assert (config.model, config.host, config.port) == ("file", "variable", 3)
    assert config.workers == ["http://file"]


def test_a_gap_is_two_seconds_or_what_is_said_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(**MINIMAL).slo_gap_s == 2.0
    monkeypatch.setenv("ARES_SLO_GAP_S", "none")
    assert load(**MINIMAL).slo_gap_s == "none"
    assert load(**MINIMAL, slo_gap_s="5").slo_gap_s == 5.0
    assert load(**MINIMAL, classes={"batch": {"gap_s": "none"}}).classes["batch"].gap_s == "none"


def test_a_flag_that_is_not_given_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_PORT", "2")
    assert load(**MINIMAL, port=None, host=None).port == 2


def test_lists_from_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_WORKERS", '["http://a", "http://b"]')
    assert load(model="m").workers == ["http://a", "http://b"]
    for text in ("http://a,http://b", " http://a , http://b, ", ' ["http://a", "http://b"]\n'):
        monkeypatch.setenv("ARES_WORKERS", text)
        assert load(model="m").workers == ["http://a", "http://b"]
    monkeypatch.setenv("ARES_WORKERS", "http://a")
    assert load(model="m").workers == ["http://a"]
    monkeypatch.setenv("ARES_API_KEYS", "sk-one,12345")
    assert [key.get_secret_value() for key in load(**MINIMAL).api_keys] == ["sk-one", "12345"]
    monkeypatch.setenv("ARES_CLASSES", '{"chat": {"ttft_s": 2}}')
    assert load(**MINIMAL).classes["chat"].ttft_s == 2


@pytest.mark.parametrize(
    "text", ['["sk-secret', '"sk-secret"', "{sk-secret}", "sk-secret,,b", "sk secret", "'sk-secret'"]
)
def test_a_list_that_is_none_is_named_with_its_form_and_not_shown(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_API_KEYS", text)
    with pytest.raises(ConfigError, match=r'^ARES_API_KEYS must be a JSON list, such as \["KEY", .*commas') as refusal:
        load(**MINIMAL)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("text", ["chat", "ttft_s=2", "{'chat': {}}"])
def test_a_mapping_that_is_none_is_named_with_its_form(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_CLASSES", text)
    with pytest.raises(ConfigError, match=r'^ARES_CLASSES must be JSON, such as \{"chat": \{"ttft_s": 2'):
        load(**MINIMAL)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("ARES_PORT", "many", r"'port' \(ARES_PORT\): .*integer"),
        ("ares_port", "many", r"'port' \(ARES_PORT\): .*integer"),
        ("ARES_WORKERS", "decode-0", r"'workers' \(ARES_WORKERS\): 'decode-0' is not the URL"),
        ("ARES_WORKERS", '{"a": 1}', r"'workers' \(ARES_WORKERS\): .*list"),
        ("ARES_CLASSES", '{"chat": {"ttft": 2}}', r"'classes\.chat\.ttft' \(ARES_CLASSES\): "),
        ("ARES_SLO_GAP_S", "0", r"'slo_gap_s' \(ARES_SLO_GAP_S\): must be seconds, greater than 0, or \"none\""),
        ("ARES_CLASSES", '{"chat": {"gap_s": "long"}}', r"'classes\.chat\.gap_s' \(ARES_CLASSES\): must be seconds"),
        ("ARES_ADMIN_KEY", " ", r"^ARES_ADMIN_KEY is empty: give it a value, or unset it$"),
        ("ARES_API_KEYS", "", r"^ARES_API_KEYS is empty"),
        ("ARES_HOST", "", r"^ARES_HOST is empty"),
        ("ARES_RECORD", " ", r"^ARES_RECORD is empty"),
        ("ARES_TLS_CERTIFICATE", "", r"^ARES_TLS_CERTIFICATE is empty"),
        ("ARES_MAXIMUM_PROMPT_TOKENS", "", r"^ARES_MAXIMUM_PROMPT_TOKENS is empty"),
        ("ARES_WORKERS", "http://a:99999", r"'http://a:99999' is not the URL"),
    ],
)
def test_a_wrong_variable_is_named(name: str, text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=said):
        load(model="m", workers=None if "WORKERS" in name else ["http://a"])


def test_a_password_in_the_url_of_an_instance_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match=r"instance at h has a user name.*--worker-api-key-file") as refused:
        load(model="m", workers=["http://user:secret@h:8100"])
    assert "secret" not in str(refused.value)


def test_white_space_around_the_url_of_an_instance_is_no_part_of_it() -> None:
    assert load(model="m", workers=[" http://a:1\n"]).workers == ["http://a:1"]


def test_no_host_is_not_every_host() -> None:
    with pytest.raises(ConfigError, match="'host'"):
        load(**MINIMAL, host="")


def test_a_variable_beside_a_flag_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_WORKERS", "[broken")
    assert load(**MINIMAL).workers == ["http://a"]


def test_what_a_command_sets_itself_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_PORT", "9000")
    monkeypatch.setenv("ARES_HOST", "0.0.0.0")  # noqa: S104 - a text
    (warning,) = variables.warnings(GatewayConfig.model_fields, overruled=["port"])
    assert warning.startswith("ARES_PORT has no effect")
    monkeypatch.setenv("ARES_PORT", "tcp://10.96.0.12:8000")  # a Service called ares: nobody meant us
    assert list(variables.warnings(GatewayConfig.model_fields, overruled=["port"])) == []


def test_a_wrong_flag_is_not_blamed_on_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_PORT", "80")
    with pytest.raises(ConfigError, match=r"^setting 'port': "):
        load(**MINIMAL, port=70000)


def test_white_space_around_a_key_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ARES_ADMIN_KEY", "ARES_WORKER_API_KEY", "ARES_API_KEYS"):
        monkeypatch.setenv(name, " sk-one\r\n")
    config = load(**MINIMAL, api_keys=["\ufeffsk-two"])
    keys = (config.admin_key, config.worker_api_key, *config.api_keys)
    assert [key.get_secret_value() for key in keys if key] == ["sk-one", "sk-one", "sk-two"]


def test_a_kubernetes_service_called_ares_does_not_disturb(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = {
        "ARES_PORT": "tcp://10.96.0.12:8000",
        "ARES_SERVICE_HOST": "10.96.0.12",
        "ARES_SERVICE_PORT": "8000",
        "ARES_SERVICE_PORT_HTTP": "8000",
        "ARES_PORT_8000_TCP": "tcp://10.96.0.12:8000",
        "ARES_PORT_8000_TCP_PROTO": "tcp",
        "ARES_PORT_8000_TCP_PORT": "8000",
        "ARES_PORT_8000_TCP_ADDR": "10.96.0.12",
    }
    for name, value in service.items():
        monkeypatch.setenv(name, value)
        # And of Services that are called ares-gateway, ares-port, ...
        monkeypatch.setenv(name.replace("ARES_", "ARES_GATEWAY_"), value)
        monkeypatch.setenv(name.replace("ARES_", "ARES_HOST_"), value)
    assert load(**MINIMAL).port == 8000
    (record,) = caplog.records
    assert re.match("ARES_PORT is tcp://.* Kubernetes .*Service called `ares`.*enableServiceLinks", record.message)
    caplog.clear()
    assert load(**MINIMAL, port=81).port == 81
    assert not caplog.records


def test_the_file_s_port_holds_beside_a_kubernetes_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_PORT", "tcp://10.96.0.12:8000")
    assert load(file(tmp_path, "port: 9000\n"), **MINIMAL).port == 9000


def test_a_variable_that_nobody_reads_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ARES_WORKRES", "http://secret")
    monkeypatch.setenv("ARES_X", "1")
    monkeypatch.setenv("ARES_LEARNER_THREADS", "2")  # which the learner reads
    load(**MINIMAL)
    typo, other = (record.message for record in caplog.records)
    assert typo == "ARES_WORKRES is not a variable of ARES and has no effect; did you mean ARES_WORKERS?"
    assert other == "ARES_X is not a variable of ARES and has no effect"


def test_variables_of_other_commands_do_not_disturb(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every variable that is written out anywhere in the project."""
    texts = [file for folder in ("src", "tests") for file in (ROOT / folder).rglob("*.py") if file != Path(__file__)]
    names = {name for text in texts for name in re.findall(r"\bARES_[A-Z_]*[A-Z]\b", text.read_text())}
    assert {"ARES_CACHE", "ARES_URL", "ARES_INSTANCE", "ARES_ADMIN_KEY", "ARES_FUZZ_TIMES"} <= names
    for name in names - {"ARES_PORT", "ARES_TLS_CERTIFICATE", "ARES_TLS_KEY"}:  # which must be a port, and files
        monkeypatch.setenv(name, "k" * 32)
    assert load(**MINIMAL).control_key is not None
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot: 8000\n", "prot"),
        ("port: many\n", "port"),
        ("port: 70000\n", "port"),
        ("workers: [decode-0]\n", "workers"),
        ("workers: ['http://[']\n", "workers"),
        ("workers: ['http://a:99999']\n", "workers"),
        ("workers: ['http://a:8100/v1']\n", "workers"),
        ("workers: ['http://a:8100/v1/']\n", "workers"),
        ("model: ''\n", "model"),
        ("period_s: .inf\n", "period_s"),
        ("period_s: 0\n", "period_s"),
        ("handover_timeout_s: 25\n", "handover_timeout_s"),
        ("preset: fast\n", "preset"),
        ("max_body_bytes: 0\n", "max_body_bytes"),
        ("service_discovery: [etcd:here]\n", "service_discovery"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, named: str) -> None:
    flags = {name: value for name, value in MINIMAL.items() if name not in text}
    with pytest.raises(ConfigError, match=f"'{named}"):
        load(file(tmp_path, text), **flags)


def test_missing_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'model' is missing: give --model, ARES_MODEL, or model: in"):
        load(workers=["http://a"])
    with pytest.raises(ConfigError, match=r"no instances: give --worker, ARES_WORKERS, or .*--service-discovery"):
        load(model="m")
    with pytest.raises(ConfigError, match="no instances"):
        load(model="m", workers=[])


@pytest.mark.parametrize(
    ("text", "said"), [("model: [", ""), ("- a\n- b\n", "lines such as"), ("just text", "lines such as")]
)
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = file(tmp_path, text)
    with pytest.raises(ConfigError, match=f"{path}: .*{said}"):
        load(path, **MINIMAL)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load(tmp_path / "nowhere.yaml", **MINIMAL)


def test_an_empty_file_is_fine(tmp_path: Path) -> None:
    assert load(file(tmp_path, ""), **MINIMAL).model == "m"


def test_presets_that_live_serving_cannot_carry_out_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"knows the true lengths.*live: off, .*ares"):
        load(**MINIMAL, preset="ares-oracle")
    assert load(**MINIMAL, preset="ares").preset == "ares"


def test_unknown_presets_list_the_known() -> None:
    with pytest.raises(ConfigError, match="static-rr"):
        load(**MINIMAL, preset="fast")


def test_the_key_is_not_shown() -> None:
    config = load(**MINIMAL, admin_key="secret")
    assert "secret" not in repr(config)
    assert config.admin_key is not None
    assert config.admin_key.get_secret_value() == "secret"


def test_a_resolved_configuration_does_not_change() -> None:
    with pytest.raises(ValidationError):
        load(**MINIMAL).port = 1  # type: ignore[misc]


SEVERAL = """
models:
  - model: org/one
    served_model_name: [one, uno]
    slo_ttft_s: 3
  - {model: org/two, max_logprobs: 5}
workers: [http://a]
max_logprobs: 7
slo_ttft_s: 4
admin_key: secret
"""


def test_several_models_have_settings_of_their_own_and_the_others_in_common(tmp_path: Path) -> None:
    config = load(file(tmp_path, SEVERAL))
    one, two = config.of_models()
    assert (config.model, one.names, two.names) == ("org/one", ["one", "uno"], ["org/two"])
    assert (one.slo_ttft_s, one.max_logprobs, two.slo_ttft_s, two.max_logprobs) == (3, 7, 4, 5)
    assert two.workers == config.workers
    assert two.admin_key == config.admin_key
    single = load(**MINIMAL)
    assert single.of_models() == [single]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [{served_model_name: [a]}]", "models.0: should be settings with a model"),
        ("models: [org/one]", "models.0: should be settings with a model"),
        ("models: 3", "models: should be a list of settings"),
        ("models: {}", "models: should be a list of settings"),
        ("models:", "models: should be a list of settings"),
        ("models: []", "models: is empty: give it at least one {model: org/name}"),
        (
            "models: [{model: a, served_model_name: ['']}]",
            "models.0.served_model_name.0: String should have",
        ),
        ("models: [{model: a, served_model_name: [b, b]}]", "models.0.served_model_name: b stands there twice"),
        ("model: a\nserved_model_name: ['']", "'served_model_name.0': String should have at least 1"),
        ("model: a\nserved_model_name: [b, b]", "'served_model_name': b stands there twice"),
        ("model: a\nclasses: {'': {}}", "String should have at least 1"),
        ("models: [{model: a, port: 3}]", "models.0.port: no setting that a model can have of its own"),
        ("models: [{model: a}]\nmodel: b", "model has no effect beside models"),
        ("models: [{model: a}]\nserved_model_name: [b]", "served_model_name has no effect beside models"),
        ("models: [{model: a}, {model: b, served_model_name: [a]}]", "two of them have the name a"),
        ("models: [{model: a, record: r}, {model: b, record: r}]", "two of them have the record r"),
        ("models: [{model: a, max_logprobs: many}]", "models.0.max_logprobs: Input should be a valid integer"),
        ("models: [{model: a, enable_auto_tool_choice: true}]", "models.0: --enable-auto-tool-choice requires"),
    ],
)
def test_what_is_wrong_with_several_models_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(file(tmp_path, f"{text}\nworkers: [http://a]\nadmin_key: secret\n"))


def test_variables_do_not_reach_into_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path, SEVERAL)
    monkeypatch.setenv("ARES_MAX_LOGPROBS", "9")
    assert [one.max_logprobs for one in load(path).of_models()] == [9, 5]
    monkeypatch.setenv("ARES_TOKENIZER", "org/other")
    with pytest.raises(ConfigError, match="tokenizer has no effect beside models"):
        load(path)
