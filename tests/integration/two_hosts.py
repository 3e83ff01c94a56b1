"""A cluster on two hosts: prefill-0 and decode-0 on one, decode-1 on the other, the gateway on a third."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from ares.engine.defaults import local_flags
from tests.integration.namespaces import Network

KEY = "a key of the control channels, for this test only"
EVERY = "0.0.0.0"  # noqa: S104 - what it is about
# A connection that is idle breaks when the peer has been silent for 4 s (by default 16 s).
_UCX = {"UCX_TLS": "tcp,self", "UCX_TCP_KEEPIDLE": "1s", "UCX_TCP_KEEPINTVL": "1s"}
BREAKS_S = 5.0
_START_S = 600.0


def _die_with_parent() -> None:
    """Ask the kernel for the end of the process when the test run is killed; the next run removes its namespaces."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass
class Cluster:
    """The processes, each on its host."""

    network: Network
    model: Path
    logs: Path
    environment: dict[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Of the gateway, on its own host."""
        return "http://127.0.0.1:8000"

    def start(self, name: str, host: str, *words: str, module: str = "ares") -> None:
        """Start a command of `ares` on a host."""
        environment = {**os.environ, "ARES_CONTROL_KEY": KEY, **_UCX, **self.environment}
        with (self.logs / f"{name}.log").open("wb") as sink:
            self.processes[name] = subprocess.Popen(
                self.network.command(host, sys.executable, "-m", module, *words),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - one call into the kernel
            )

    def start_all(self, profile: str | None, flags: tuple[str, ...]) -> None:
        """Start every process: real engines with these flags of vLLM, or mock engines of a profile."""
        one, two = self.network.addresses["one"], self.network.addresses["two"]
        cores = sorted(os.sched_getaffinity(0))
        # All listen on every address. The first two find out which one to publish, the third is given it.
        self.start_worker("prefill-0", "one", 8100, profile, flags, cores[0])
        self.start_worker("decode-0", "one", 8101, profile, flags, cores[0])
        self.start_worker("decode-1", "two", 8100, profile, flags, cores[-1], "--advertise-host", two)
        urls = [f"http://{one}:8100", f"http://{one}:8101", f"http://{two}:8100"]
        workers = [word for url in urls for word in ("--worker", url)]
        self.start("gateway", "gateway", "gateway", "--model", str(self.model), "--preset", "off", *workers)

    def start_worker(
        self, name: str, host: str, port: int, profile: str | None, flags: tuple[str, ...], core: int, *more: str
    ) -> None:
        """Start an instance on ports that follow from that of its HTTP server."""
        words = ["worker", "--model", str(self.model), "--role", name.partition("-")[0], "--name", name, *more]
        words += ["--host", EVERY, "--port", str(port), "--control-port", str(port + 100), "--drain-deadline", "0"]
        if profile is None:
            words += ["--nixl-port", str(port + 200), "--cores", str(core), "--", *local_flags(list(flags))]
        else:
            words += ["--simulate", profile, "--", *flags]
        # Instances that load vLLM are forked where a server runs for that.
        self.start(name, host, *words, module="ares" if profile else "ares_dev.forked_engine")

    def await_ready(self) -> None:
        """Wait until the gateway uses all instances."""
        deadline = time.monotonic() + _START_S
        while (text := self._status()).count('"healthy":true') < 3:
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} has ended:\n{self.log_end(name)}"
            assert time.monotonic() < deadline, text + "".join(self.log_end(name) for name in self.processes)
            time.sleep(0.3)

    def _status(self) -> str:
        made = self.network.socket_on("gateway")((socket.AF_INET, socket.SOCK_STREAM, 0))
        with made, contextlib.suppress(OSError):
            made.settimeout(5)
            made.connect(("127.0.0.1", 8000))
            made.sendall(b"GET /admin/v1/status HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            parts = []
            while part := made.recv(1 << 16):
                parts.append(part)
            return b"".join(parts).decode().replace(": ", ":")
        return ""

    def log_end(self, name: str) -> str:
        """Return the last lines of the log of a process."""
        lines = (self.logs / f"{name}.log").read_text(errors="replace").splitlines()
        return "\n".join(["", f"--- {name} ---", *lines[-25:]])

    def kill(self, name: str) -> None:
        """Kill a process and its children at once, and wait for it."""
        process = self.processes[name]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def connector(self) -> aiohttp.TCPConnector:
        """Return a connector of a client on the gateway's host."""
        return aiohttp.TCPConnector(limit=0, socket_factory=self.network.socket_on("gateway"))


@contextlib.contextmanager
def running(
    model: Path, logs: Path, *flags: str, profile: str | None = None, environment: dict[str, str] | None = None
) -> Iterator[Cluster]:
    """Run the cluster, of mock engines where a profile is given; nothing of it is left afterwards."""
    with Network("one", "two", "gateway") as network:
        cluster = Cluster(network, model, logs, environment or {})
        try:
            cluster.start_all(profile, flags)
            cluster.await_ready()
            yield cluster
        finally:
            for name in cluster.processes:
                cluster.kill(name)
