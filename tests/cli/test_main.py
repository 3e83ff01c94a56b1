"""What the `ares` command says before it starts anything."""

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from ares import __version__
from ares.cli import main as cli
from ares.engine import given_flags, vllm_version
from ares.free_ports import free_ports
from ares.local_cluster import cluster as local
from ares.local_cluster import supervision
from ares.models import resolve as model
from ares.protocol.fields import ALLOW_UNSUPPORTED_VLLM_VARIABLE

SIMULATED = ["worker", "--role", "decode", "--simulate", "llama-8b-rtx4090", "--model", "no/model"]
GATEWAY = ["gateway", "--model", "no/model", "--worker", "http://127.0.0.1:9"]
UP = ["up", "--model", "no/model"]


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes before the model is all that happens here."""

    def resolve(*_: object, **__: object) -> None:
        raise model.ModelError("the model was asked for")

    monkeypatch.setattr(model, "resolve", resolve)


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["ares", *arguments])
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert time.monotonic() - began < 60
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def taken() -> Iterator[int]:
    """The second of two ports, which somebody listens on."""
    first = free_ports("127.0.0.1", 2)
    with socket.create_server(("127.0.0.1", first + 1)):
        yield first + 1


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (GATEWAY, "--port"),
        (UP, "--port"),
        ([*UP, "--simulate", "llama-8b-rtx4090"], "--port"),
        (SIMULATED, "--port"),
        (SIMULATED, "--control-port"),
        (["worker", "--role", "prefill", "--model", "no/model"], "--port"),
        (["worker", "--role", "prefill", "--model", "no/model"], "--control-port"),
        (["worker", "--role", "prefill", "--model", "no/model"], "--nixl-port"),
    ],
)
def test_a_taken_port_is_one_line(
    taken: int, command: list[str], flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, flag, str(taken)], monkeypatch) == 2
    in_use = f"127.0.0.1:{taken} is in use: stop the process that listens there, or choose another {flag}"
    assert capsys.readouterr().err == f"error: {in_use}\n"


@pytest.mark.parametrize("flag", ["--port", "--control-port"])
def test_so_is_one_of_several_instances(
    taken: int, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*SIMULATED, flag, str(taken - 1), "--", "--instances", "2"], monkeypatch) == 2
    assert f"127.0.0.1:{taken} is in use" in capsys.readouterr().err


@pytest.mark.parametrize("command", [GATEWAY, SIMULATED, UP, ["worker", "--role", "decode", "--model", "no/model"]])
@pytest.mark.parametrize("port", ["65536", "-1"])
def test_a_port_that_is_none_is_refused(
    command: list[str], port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--port", port], monkeypatch) == 2
    assert "port" in capsys.readouterr().err


@pytest.mark.parametrize("command", [GATEWAY, UP])
def test_an_endpoint_open_to_the_network_without_keys_is_warned_of(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def said(*flags: str) -> str:
        caplog.clear()
        assert run([*command, "--port", str(free_ports("127.0.0.1", 1)), *flags], monkeypatch) == 2
        return " ".join([*capsys.readouterr().err.split(), *(record.getMessage() for record in caplog.records)])

    warned = said("--host", "0.0.0.0")  # noqa: S104 - what it is about
    assert "--host 0.0.0.0 without client keys" in warned
    assert "--api-key-file" in warned
    assert warned.count("without client keys") == 1
    assert "without client keys" not in said("--host", "127.0.0.2")
    keys = tmp_path / "keys"
    keys.write_text("secret-of-a-client\n")
    assert "client keys" not in said("--host", "0.0.0.0", "--api-key-file", str(keys))  # noqa: S104
    monkeypatch.setenv("ARES_API_KEYS", '["secret-of-a-client"]')
    assert "client keys" not in said("--host", "0.0.0.0")  # noqa: S104


@pytest.mark.parametrize(
    "command", [SIMULATED, ["worker", "--role", "decode", "--model", "no/model", "--control-insecure"]]
)
def test_an_address_that_others_cannot_connect_to_is_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARES_CONTROL_KEY", "k" * 32)
    assert run([*command, "--host", "0.0.0.0", "--advertise-host", "::"], monkeypatch) == 2  # noqa: S104
    said = capsys.readouterr().err
    assert said.startswith("error: --advertise-host :: stands for every address")
    assert said.count("\n") == 1


def test_instances_of_up_are_reached_by_nobody_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*UP, "--advertise-host", "10.0.0.1"], monkeypatch) == 2
    assert "--advertise-host is of `ares worker`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SIMULATED, "--learn", "--record-at-once", "4"], "--learn, --record-at-once changes nothing with --simulate"),
        (["worker", "--role", "decode", "--record-token-ids"], "--record-token-ids changes nothing without --learn"),
        (["worker", "--role", "decode", "--predictor", "learn", "--no-learn"], "contradict each other"),
    ],
)
def test_recording_options_without_effect_are_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments, monkeypatch) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], monkeypatch) == 0
    assert capsys.readouterr().out == f"ares {__version__}\n"


@pytest.mark.parametrize(("flags", "way"), [([], "supervised"), (["--no-restart"], "waited for")])
def test_no_restart_ends_with_the_first_death(
    flags: list[str], way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def ends(how: str) -> Callable[..., None]:
        def end(*_: object) -> None:
            raise local.ClusterError(how)

        return end

    @contextlib.contextmanager
    def running(settings: local.ClusterSettings, console: Console) -> Iterator[local.Cluster]:
        process = local.ManagedProcess("gateway", "http://g", tmp_path / "log", [], None, None)  # type: ignore[arg-type]
        yield local.Cluster(settings, console, tmp_path, [process])

    monkeypatch.setattr(model, "resolve", lambda *_, **__: tmp_path)
    monkeypatch.setattr(cli, "signal_as_interrupt", lambda: None)
    monkeypatch.setattr(local, "running", running)
    monkeypatch.setattr(local.Cluster, "wait", ends("waited for"))
    monkeypatch.setattr(supervision.Supervisor, "run", ends("supervised"))
    assert run([*UP, "--no-learn", "--port", str(free_ports("127.0.0.1", 1)), *flags], monkeypatch) == 2
    assert capsys.readouterr().err == f"error: {way}\n"


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--prefill-args", "-x 'y"], "No closing quotation"),
        (["--decode-args", "64"], "expected flags of vLLM"),
        (["--decode-args", "--served-model-name=m"], "is for all instances"),
        (["--prefill", "0", "--prefill-args", "--max-num-seqs 8"], "--prefill-args has no effect with --prefill 0"),
        (["--decode-args", "--api-key k"], "--api-key would show the key"),
        (["--device-ids", "0"], "CUDA_VISIBLE_DEVICES"),
        (["--decode-args", "--device_ids=1"], "CUDA_VISIBLE_DEVICES"),
        (["--share-gpus", "--simulate", "llama-8b-rtx4090"], "--share-gpus has no effect with --simulate"),
    ],
)
def test_flags_of_instances_that_cannot_work_are_refused(
    flags: list[str], part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*UP, *flags], monkeypatch) == 2
    assert part in capsys.readouterr().err


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[local.ClusterSettings]:
    """What clusters are started with; none starts."""
    given: list[local.ClusterSettings] = []

    @contextlib.contextmanager
    def running(settings: local.ClusterSettings, _: Console) -> Iterator[local.Cluster]:
        given.append(settings)
        raise local.ClusterError("enough")
        yield

    monkeypatch.setattr(model, "resolve", lambda *_, **__: tmp_path)
    monkeypatch.setattr(cli, "signal_as_interrupt", lambda: None)
    monkeypatch.setattr(local, "running", running)
    return given


def test_flags_by_role_and_the_start_timeout_reach_the_cluster(
    monkeypatch: pytest.MonkeyPatch, given: list[local.ClusterSettings]
) -> None:
    flags = ["--prefill-args", "--max-num-seqs 8", "--decode-args=--max-num-seqs 64 --seed 1", "--start-timeout", "7"]
    assert run([*UP, "--port", str(free_ports("127.0.0.1", 1)), *flags], monkeypatch) == 2
    (settings,) = given
    assert settings.flags("prefill")[-2:] == ("--max-num-seqs", "8")
    assert settings.flags("decode")[-4:] == ("--max-num-seqs", "64", "--seed", "1")
    assert settings.start_timeout_s == 7
    assert settings.decode == 2


@pytest.mark.parametrize("simulated", [False, True])
def test_a_collector_gets_the_spans_of_gateway_and_instances(
    monkeypatch: pytest.MonkeyPatch, given: list[local.ClusterSettings], *, simulated: bool
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    flags = ["--otlp-traces-endpoint", "http://127.0.0.1:4318", "--port", str(free_ports("127.0.0.1", 1))]
    assert run([*UP, *flags, *(["--simulate", "llama-8b-rtx4090"] if simulated else [])], monkeypatch) == 2
    (settings,) = given
    both = ("--otlp-traces-endpoint", "http://127.0.0.1:4318/v1/traces")
    assert settings.gateway_flags[-2:] == both
    assert (settings.vllm_flags[-2:] == both) is not simulated


@pytest.mark.parametrize("command", [GATEWAY, UP])
def test_a_collector_that_cannot_be_used_is_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*command, "--port", str(free_ports("127.0.0.1", 1)), "--otlp-traces-endpoint"]
    assert run([*asked, "collector:4317"], monkeypatch) == 2
    assert "give a URL such as http://127.0.0.1:4318/v1/traces" in capsys.readouterr().err
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")
    assert run([*asked, "http://collector:4318"], monkeypatch) == 2
    assert "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=grpc: spans are sent by http/protobuf only" in capsys.readouterr().err


@pytest.mark.parametrize("command", [UP, ["worker", "--role", "decode", "--model", "no/model"]])
def test_a_vllm_that_is_not_supported_is_refused_before_the_model_is_fetched(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_version, "installed", lambda: "0.31.0")
    monkeypatch.setenv(ALLOW_UNSUPPORTED_VLLM_VARIABLE, "")
    monkeypatch.delenv(ALLOW_UNSUPPORTED_VLLM_VARIABLE)
    free = ["--port", str(free_ports("127.0.0.1", 1))]
    assert run([*command, *free], monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: vLLM 0.31.0 is installed, and ARES supports 0.32 and 0.33")
    assert said.count("\n") == 1
    assert run([*command, *free, "--allow-unsupported-vllm"], monkeypatch) == 2
    assert "the model was asked for" in capsys.readouterr().err


@pytest.mark.parametrize("command", [UP, ["worker", "--role", "decode", "--model", "no/model"], ["check"]])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kv-offloading-size: 4\n", "--kv-offloading-size: KV offloading cannot be combined with moves"),
        ("runner: pooling\n", "--runner: pooling models are not served"),
        ("api-key: [secret]\n", "--api-key would show the key"),
        ("root-path: /a\n", "--root-path would have no effect"),
        ("model: other/model\n", "model: leave it out, and give --model to the `ares` command"),
        ("seed 1\n", "should be lines such as `max-model-len: 4096`"),
        (None, "No such file"),
    ],
)
def test_what_a_file_of_flags_says_is_refused_as_on_the_command_line(
    command: list[str],
    text: str | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "flags.yaml"
    if text is not None:
        file.write_text(text)
    assert run([*command, "--config", str(file)], monkeypatch) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_file_of_flags_is_not_overridden_by_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: list[local.ClusterSettings]
) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("max_model_len: 1024\nserved-model-name: [mine]\nseed: 3\nchat-template: null\n")
    (tmp_path / "decode.yaml").write_text("tensor-parallel-size: 2\n")
    flags = ["--config", str(file), "--decode-args", f"--config {tmp_path / 'decode.yaml'}", "--seed", "4"]
    assert run([*UP, "--port", str(free_ports("127.0.0.1", 1)), *flags], monkeypatch) == 2
    (settings,) = given
    decode = settings.flags("decode")
    found = [(flag.name, flag.value) for flag in given_flags.each(decode)]
    assert [value for name, value in found if name == "max-model-len"] == ["1024"]
    assert [value for name, value in found if name == "seed"] == ["3", "4"]
    assert ("served-model-name", "mine") in found
    assert decode[-2:] == ("--tensor-parallel-size", "2")
    assert "--tensor-parallel-size" not in settings.flags("prefill")
    assert "--config" not in settings.vllm_flags
