"""What the `ares` command says before it starts anything."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ares import __version__
from ares.engine import vllm_version
from ares.free_ports import free_ports
from ares.protocol.fields import ALLOW_UNSUPPORTED_VLLM_VARIABLE

Run = Callable[[list[str]], int]

SIMULATED = ["worker", "--role", "decode", "--simulate", "llama-8b-rtx4090", "--model", "no/model"]
GATEWAY = ["gateway", "--model", "no/model", "--worker", "http://127.0.0.1:9"]
UP = ["up", "--model", "no/model"]


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
    run: Run, taken: int, command: list[str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, flag, str(taken)]) == 2
    in_use = f"127.0.0.1:{taken} is in use: stop the process that listens there, or choose another {flag}"
    assert capsys.readouterr().err == f"error: {in_use}\n"


@pytest.mark.parametrize("flag", ["--port", "--control-port"])
def test_so_is_one_of_several_instances(run: Run, taken: int, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SIMULATED, flag, str(taken - 1), "--", "--instances", "2"]) == 2
    assert f"127.0.0.1:{taken} is in use" in capsys.readouterr().err


@pytest.mark.parametrize("command", [GATEWAY, SIMULATED, UP, ["worker", "--role", "decode", "--model", "no/model"]])
@pytest.mark.parametrize("port", ["65536", "-1"])
def test_a_port_that_is_none_is_refused(
    run: Run, command: list[str], port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--port", port]) == 2
    assert "port" in capsys.readouterr().err


@pytest.mark.parametrize("command", [GATEWAY, UP])
def test_an_endpoint_open_to_the_network_without_keys_is_warned_of(
    run: Run,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def said(*flags: str) -> str:
        caplog.clear()
        assert run([*command, "--port", str(free_ports("127.0.0.1", 1)), *flags]) == 2
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
    run: Run, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARES_CONTROL_KEY", "k" * 32)
    assert run([*command, "--host", "0.0.0.0", "--advertise-host", "::"]) == 2  # noqa: S104
    said = capsys.readouterr().err
    assert said.startswith("error: --advertise-host :: stands for every address")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SIMULATED, "--learn", "--record-at-once", "4"], "--learn, --record-at-once changes nothing with --simulate"),
        (["worker", "--role", "decode", "--record-token-ids"], "--record-token-ids changes nothing without --learn"),
        (["worker", "--role", "decode", "--predictor", "learn", "--no-learn"], "contradict each other"),
    ],
)
def test_recording_options_without_effect_are_one_line(
    run: Run, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_the_version(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"ares {__version__}\n"


@pytest.mark.parametrize("command", [GATEWAY, UP])
def test_a_collector_that_cannot_be_used_is_one_line(
    run: Run, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*command, "--port", str(free_ports("127.0.0.1", 1)), "--otlp-traces-endpoint"]
    assert run([*asked, "collector:4317"]) == 2
    assert "give a URL such as http://127.0.0.1:4318/v1/traces" in capsys.readouterr().err
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")
    assert run([*asked, "http://collector:4318"]) == 2
    assert "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=grpc: spans are sent by http/protobuf only" in capsys.readouterr().err


@pytest.mark.parametrize("command", [UP, ["worker", "--role", "decode", "--model", "no/model"]])
def test_a_vllm_that_is_not_supported_is_refused_before_the_model_is_fetched(
    run: Run, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_version, "installed", lambda: "0.31.0")
    monkeypatch.setenv(ALLOW_UNSUPPORTED_VLLM_VARIABLE, "")
    monkeypatch.delenv(ALLOW_UNSUPPORTED_VLLM_VARIABLE)
    free = ["--port", str(free_ports("127.0.0.1", 1))]
    assert run([*command, *free]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: vLLM 0.31.0 is installed, and ARES supports 0.32 and 0.33")
    assert said.count("\n") == 1
    assert run([*command, *free, "--allow-unsupported-vllm"]) == 2
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
    run: Run,
    command: list[str],
    text: str | None,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "flags.yaml"
    if text is not None:
        file.write_text(text)
    assert run([*command, "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
