"""What `ares up` says before it starts anything, and what it starts."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from ares.engine import given_flags
from ares.free_ports import free_ports
from ares.local_cluster import cluster as local
from ares.local_cluster import supervision
from ares.models import resolve as model

Run = Callable[[list[str]], int]

UP = ["up", "--model", "no/model"]


def test_instances_of_up_are_reached_by_nobody_else(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*UP, "--advertise-host", "10.0.0.1"]) == 2
    assert "--advertise-host is of `ares worker`" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "way"), [([], "supervised"), (["--no-restart"], "waited for")])
def test_no_restart_ends_with_the_first_death(
    run: Run,
    flags: list[str],
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
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
    monkeypatch.setattr("ares.cli.up.signal_as_interrupt", lambda: None)
    monkeypatch.setattr(local, "running", running)
    monkeypatch.setattr(local.Cluster, "wait", ends("waited for"))
    monkeypatch.setattr(supervision.Supervisor, "run", ends("supervised"))
    assert run([*UP, "--no-learn", "--port", str(free_ports("127.0.0.1", 1)), *flags]) == 2
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
    run: Run, flags: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*UP, *flags]) == 2
    assert part in capsys.readouterr().err


@pytest.fixture
def given(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[local.ClusterSettings]:
    """What clusters are started with; none starts."""
    given: list[local.ClusterSettings] = []

    @contextlib.contextmanager
    def running(settings: local.ClusterSettings, _: Console) -> Iterator[local.Cluster]:
        given.append(settings)
        raise local.ClusterError("enough")
        yield

    monkeypatch.setattr(model, "resolve", lambda *_, **__: tmp_path)
    monkeypatch.setattr("ares.cli.up.signal_as_interrupt", lambda: None)
    monkeypatch.setattr(local, "running", running)
    return given


def test_flags_by_role_and_the_start_timeout_reach_the_cluster(run: Run, given: list[local.ClusterSettings]) -> None:
    flags = ["--prefill-args", "--max-num-seqs 8", "--decode-args=--max-num-seqs 64 --seed 1", "--start-timeout", "7"]
    assert run([*UP, "--port", str(free_ports("127.0.0.1", 1)), *flags]) == 2
    (settings,) = given
    assert settings.flags("prefill")[-2:] == ("--max-num-seqs", "8")
    assert settings.flags("decode")[-4:] == ("--max-num-seqs", "64", "--seed", "1")
    assert settings.start_timeout_s == 7
    assert settings.decode == 2


@pytest.mark.parametrize("simulated", [False, True])
def test_a_collector_gets_the_spans_of_gateway_and_instances(
    run: Run, monkeypatch: pytest.MonkeyPatch, given: list[local.ClusterSettings], *, simulated: bool
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    flags = ["--otlp-traces-endpoint", "http://127.0.0.1:4318", "--port", str(free_ports("127.0.0.1", 1))]
    assert run([*UP, *flags, *(["--simulate", "llama-8b-rtx4090"] if simulated else [])]) == 2
    (settings,) = given
    both = ("--otlp-traces-endpoint", "http://127.0.0.1:4318/v1/traces")
    assert settings.gateway_flags[-2:] == both
    assert (settings.vllm_flags[-2:] == both) is not simulated


def test_a_file_of_flags_is_not_overridden_by_defaults(
    run: Run, tmp_path: Path, given: list[local.ClusterSettings]
) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("max_model_len: 1024\nserved-model-name: [mine]\nseed: 3\nchat-template: null\n")
    (tmp_path / "decode.yaml").write_text("tensor-parallel-size: 2\n")
    flags = ["--config", str(file), "--decode-args", f"--config {tmp_path / 'decode.yaml'}", "--seed", "4"]
    assert run([*UP, "--port", str(free_ports("127.0.0.1", 1)), *flags]) == 2
    (settings,) = given
    decode = settings.flags("decode")
    found = [(flag.name, flag.value) for flag in given_flags.each(decode)]
    assert [value for name, value in found if name == "max-model-len"] == ["1024"]
    assert [value for name, value in found if name == "seed"] == ["3", "4"]
    assert ("served-model-name", "mine") in found
    assert decode[-2:] == ("--tensor-parallel-size", "2")
    assert "--tensor-parallel-size" not in settings.flags("prefill")
    assert "--config" not in settings.vllm_flags
