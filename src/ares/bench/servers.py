"""Servers of streams, each in a process of its own, for measurements side by side: mock engines, gateways, routers."""

import contextlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from ares.bench.environment import describe
from ares.free_ports import free_port
from ares.terminal.http_client import open_direct

if TYPE_CHECKING:
    import psutil

_START_TIMEOUT_S = 60.0


RouterFile = Annotated[Path | None, typer.Option(help="PyPI's vllm-router executable, to be measured as well.")]
DynamoPython = Annotated[
    Path | None,
    typer.Option(help="Python with NVIDIA Dynamo (ai-dynamo), the frontend of which is to be measured as well."),
]


class BenchError(RuntimeError):
    """A measurement cannot be made; the message says why."""


@dataclass(slots=True)
class Server:
    """Something that serves chat streams."""

    name: str
    port: int
    process: "psutil.Process"

    @property
    def family(self) -> "list[psutil.Process]":
        """The process and all that it has started."""
        return [self.process, *self.process.children(recursive=True)]

    def cpu(self) -> float:
        """User and system seconds of all its processes."""
        return sum(sum(process.cpu_times()[:2]) for process in self.family)

    def rss_mb(self) -> float:
        """Resident size of all its processes; what they share counts for each."""
        return sum(process.memory_info().rss for process in self.family) / 2**20

    def pss_mb(self) -> list[float]:
        """Resident size of each of its processes; of what several share, each has its part (Linux)."""
        return [process.memory_full_info().pss / 2**20 for process in self.family]


@contextlib.contextmanager
def mock(role: str, folder: Path, model: str, logs: Path) -> Iterator[Server]:
    """Run a mock engine that computes nothing (mock_engine/free_running.py)."""
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "ares.mock_engine.free_running", "--role", role, "--port", str(port)]
    command += ["--folder", str(folder), "--model", model]
    with _served(f"mock {role}", command, port, logs, "/version", ["mock"]) as server:
        yield server


@contextlib.contextmanager
def gateway(
    ports: Mapping[str, int], model: str, logs: Path, name: str = "ares", flags: Sequence[str] = ()
) -> Iterator[Server]:
    """Run a gateway of ARES in front of mocks, given by role."""
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "ares", "gateway", "--model", model, "--port", str(port)]
    for mocked in ports.values():
        command += ["--worker", f"http://127.0.0.1:{mocked}"]
    command += flags
    with _served(name, command, port, logs, "/version", [f"mock-{role}" for role in ports]) as server:
        yield server


@contextlib.contextmanager
def vllm_router(router: Path, ports: Mapping[str, int], mode: str, logs: Path) -> Iterator[Server]:
    """Run PyPI's vllm-router in front of mocks, given by role; `mode` is ``prefill-decode`` or ``plain``."""
    port = free_port("127.0.0.1")
    command = [str(router), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(free_port("127.0.0.1"))]
    command += ["--policy", "round_robin", "--log-level", "warning", "--worker-startup-check-interval", "1"]
    prefill, decode = (f"http://127.0.0.1:{ports[role]}" for role in ("prefill", "decode"))
    if mode == "plain":
        command += ["--worker-urls", decode]
    else:
        command += ["--vllm-pd-disaggregation", "--prefill", prefill, "--decode", decode]
    with _served(f"vllm-router {mode}", command, port, logs, "/health", []) as server:
        yield server


@contextlib.contextmanager
def dynamo(python: Path, folder: Path, model: str, ids: Sequence[int], logs: Path) -> Iterator[tuple[Server, Path]]:
    """Run the frontend of NVIDIA Dynamo in front of a worker that generates `ids` (dynamo_worker.py).

    Yields
    ------
    The frontend, and a file with the seconds between two tokens of a stream.
    """
    port, pace = free_port("127.0.0.1"), logs / "dynamo-pace"
    pace.write_text("0")
    discovery = {"DYN_FILE_KV": str(logs / "dynamo-discovery"), "DYN_LOG": "warn"}
    worker = [str(python), str(Path(__file__).with_name("dynamo_worker.py")), "--folder", str(folder)]
    worker += ["--model", model, "--ids", ",".join(map(str, ids)), "--pace", str(pace)]
    frontend = [str(python), "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
    frontend += ["--router-mode", "round-robin", "--discovery-backend", "file", "--request-plane", "tcp"]
    frontend += ["--response-plane", "tcp", "--event-plane", "zmq"]
    with (
        _process("dynamo worker", worker, logs, discovery),
        _served("dynamo", frontend, port, logs, "/v1/models", [model], discovery) as server,
    ):
        yield server, pace


@contextlib.contextmanager
def _process(
    name: str, command: list[str], logs: Path, variables: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run a process, with further environment variables; yield it and its log."""
    log = logs / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as sink:
        try:
            process = subprocess.Popen(  # noqa: S603 - our own command
                # A separate process group, so that Ctrl-C reaches only us and one signal reaches all that it started.
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                process_group=0,
                env={**os.environ, **variables},
            )
        except OSError as error:
            raise BenchError(f"{name} cannot be started: {error}") from error
    try:
        yield process, log
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)


@contextlib.contextmanager
def _served(
    name: str,
    command: list[str],
    port: int,
    logs: Path,
    route: str,
    expected: list[str],
    variables: Mapping[str, str] = {},
) -> Iterator[Server]:
    """Run a server, and yield it once the answer of `route` contains all of `expected`."""
    with _process(name, command, logs, variables) as (process, log):
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError):
                answer = _get(port, route)
                if all(text in answer for text in expected):
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{name} does not serve; the end of its log:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        import psutil

        yield Server(name, port, psutil.Process(process.pid))


def _get(port: int, route: str, body: bytes | None = None) -> str:
    with open_direct(f"http://127.0.0.1:{port}{route}", 5, body) as reply:
        return str(reply.read().decode())


def set_pace(mock: Server, interval_s: float) -> None:
    """Let a mock engine write a token of each stream every so many seconds; 0: as fast as it is read."""
    _get(mock.port, "/simulate/pace", msgspec.json.encode({"interval_s": interval_s}))


def result(
    benchmark: str,
    note: str,
    plan: Any,
    router: Path | None,
    systems: dict[str, Any],
    dynamo_python: Path | None = None,
) -> dict[str, Any]:
    """Return what a measurement of several systems writes: its settings, where and when, and the figures of each."""
    described = describe()
    described["versions"] |= versions(router, dynamo_python)
    whole = {
        "benchmark": benchmark,
        "note": note,
        "settings": asdict(plan),
        **described,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "systems": systems,
    }
    return dict(msgspec.to_builtins(whole))


def versions(router: Path | None, dynamo_python: Path | None = None) -> dict[str, str]:
    """Return the versions of what serves, those of the router and of Dynamo too, where they are given."""
    found = {name: importlib.metadata.version(name) for name in ("httptools", "msgspec", "tokenizers", "uvloop")}
    # Both have environments of their own.
    if router is not None:
        found |= _version(router.parent / "python", "vllm-router")
    if dynamo_python is not None:
        found |= _version(dynamo_python, "ai-dynamo")
    return found


def _version(python: Path, package: str) -> dict[str, str]:
    """Return the version of a package for an interpreter; nothing where it cannot be found out."""
    ask = f"from importlib.metadata import version; print(version({package!r}))"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(  # noqa: S603 - the operator's own
            [python, "-c", ask], capture_output=True, text=True, timeout=30, check=True
        )
        return {package: asked.stdout.strip()}
    return {}
