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
def _served(name: str, command: list[str], port: int, logs: Path, route: str, expected: list[str]) -> Iterator[Server]:
    """Run a server, and yield it once the answer of `route` contains all of `expected`."""
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
            )
        except OSError as error:
            raise BenchError(f"{name} cannot be started: {error}") from error
    try:
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
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)


def _get(port: int, route: str, body: bytes | None = None) -> str:
    with open_direct(f"http://127.0.0.1:{port}{route}", 5, body) as reply:
        return str(reply.read().decode())


def set_pace(mock: Server, interval_s: float) -> None:
    """Let a mock engine write a token of each stream every so many seconds; 0: as fast as it is read."""
    _get(mock.port, "/simulate/pace", msgspec.json.encode({"interval_s": interval_s}))


def result(benchmark: str, note: str, plan: Any, router: Path | None, systems: dict[str, Any]) -> dict[str, Any]:
    """Return what a measurement of several systems writes: its settings, where and when, and the figures of each."""
    described = describe()
    described["versions"] |= versions(router)
    whole = {
        "benchmark": benchmark,
        "note": note,
        "settings": asdict(plan),
        **described,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "systems": systems,
    }
    return dict(msgspec.to_builtins(whole))


def versions(router: Path | None) -> dict[str, str]:
    """Return the versions of what serves, the router's too, if there is one."""
    found = {name: importlib.metadata.version(name) for name in ("httptools", "msgspec", "tokenizers", "uvloop")}
    if router is not None:
        # The router has its own environment.
        ask = "from importlib.metadata import version; print(version('vllm-router'))"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = subprocess.run(  # noqa: S603 - the operator's own
                [router.parent / "python", "-c", ask], capture_output=True, text=True, timeout=30, check=True
            )
            found["vllm-router"] = asked.stdout.strip()
    return found
