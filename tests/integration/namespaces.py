"""Hosts as network namespaces on one switch, with links that can be cut, closed to one peer, slow and lossy.

Everything is made by `ip` as root, in namespaces of its own: nothing of the machine's own network is touched. Names
begin with the process id, and what a killed run has left is removed by the next one.
"""

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_PREFIX = "ares-test-"
_SWITCH = "switch"
_NET = "10.77.0"
_ROUTER = f"{_NET}.254"
_CLONE_NEWNET = 0x40000000
_FOLDER = Path("/run/netns")


class Network:
    """A switch and the hosts on it, 10.77.0.1 and so on in the order of their names; use it as a context manager."""

    def __init__(self, *hosts: str) -> None:
        self.addresses = {host: f"{_NET}.{number}" for number, host in enumerate(hosts, 1)}
        self._prefix = f"{_PREFIX}{os.getpid()}-"

    def __enter__(self) -> "Network":
        _remove_left()
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        for name in (_SWITCH, *self.addresses):
            _ip("netns", "add", self._namespace(name))
            self._in(name, "link", "set", "lo", "up")
        self._in(_SWITCH, "link", "add", "bridge", "type", "bridge")
        self._in(_SWITCH, "address", "add", f"{_ROUTER}/24", "dev", "bridge")
        self._in(_SWITCH, "link", "set", "bridge", "up")
        for host, address in self.addresses.items():
            peer = ("peer", "name", "eth0", "netns", self._namespace(host))
            self._in(_SWITCH, "link", "add", f"port-{host}", "type", "veth", *peer)
            self._in(_SWITCH, "link", "set", f"port-{host}", "up", "master", "bridge")
            self._in(host, "address", "add", f"{address}/24", "dev", "eth0")
            self._in(host, "link", "set", "eth0", "up")
            self._in(host, "route", "add", "default", "via", _ROUTER)

    def __exit__(self, *_: object) -> None:
        for name in (*self.addresses, _SWITCH):
            if (_FOLDER / self._namespace(name)).exists():
                _ip("netns", "delete", self._namespace(name))

    def command(self, host: str, *words: str) -> list[str]:
        """Return the command line that runs a command on a host."""
        return ["ip", "netns", "exec", self._namespace(host), *words]

    def socket_on(self, host: str) -> Any:
        """Return a factory of sockets on a host, for aiohttp's TCPConnector."""
        return lambda info: _within(_FOLDER / self._namespace(host), lambda: socket.socket(*info[:3]))

    # --- faults ---

    @contextlib.contextmanager
    def cut(self, host: str) -> Iterator[None]:
        """Take a host from the switch: its packets, and those to it, are lost without an error."""
        self._in(_SWITCH, "link", "set", f"port-{host}", "nomaster")
        try:
            yield
        finally:
            self._in(_SWITCH, "link", "set", f"port-{host}", "master", "bridge")

    @contextlib.contextmanager
    def closed_between(self, one: str, other: str) -> Iterator[None]:
        """Lose the packets between two hosts, without an error; others reach both of them."""
        # A blackhole route would be an error for the sender. No station has this address: the switch drops its frames.
        pairs = ((one, other), (other, one))
        for host, peer in pairs:
            wrong = ("lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent")
            self._in(host, "neighbour", "replace", self.addresses[peer], *wrong)
        try:
            yield
        finally:
            for host, peer in pairs:
                self._in(host, "neighbour", "delete", self.addresses[peer], "dev", "eth0")

    @contextlib.contextmanager
    def impaired(self, host: str, delay_s: float, loss: float) -> Iterator[None]:
        """Delay what a host sends and gets, each way, and lose a share of it."""
        port = f"port-{host}"
        self._in(_SWITCH, "link", "add", "slow0", "type", "veth", "peer", "name", "slow1")
        self._in(_SWITCH, "link", "set", "slow1", "up", "master", "bridge")
        self._in(_SWITCH, "link", "set", "slow0", "up", "promisc", "on")
        self._in(_SWITCH, "link", "set", port, "nomaster", "promisc", "on")
        relay = [sys.executable, str(Path(__file__).with_name("slow_link.py")), port, "slow0", str(delay_s), str(loss)]
        process = subprocess.Popen(self.command(_SWITCH, *relay))
        try:
            yield
            assert process.poll() is None, "the slow link has ended"
        finally:
            process.kill()
            process.wait()
            self._in(_SWITCH, "link", "delete", "slow0")
            self._in(_SWITCH, "link", "set", port, "master", "bridge", "promisc", "off")

    def _namespace(self, name: str) -> str:
        return self._prefix + name

    def _in(self, name: str, *words: str) -> None:
        _ip("-netns", self._namespace(name), *words)


def why_not() -> str | None:
    """Return why this process cannot make hosts; None where it can."""
    if shutil.which("ip") is None:
        return "needs `ip` (iproute2)"
    if os.geteuid() != 0:
        return "needs root, to create network namespaces"
    name = f"{_PREFIX}{os.getpid()}-probe"
    try:
        _ip("netns", "add", name)
        _ip("-netns", name, "link", "add", "one", "type", "veth", "peer", "name", "two")
        _ip("-netns", name, "link", "add", "bridge", "type", "bridge")
    except RuntimeError as error:
        return f"may not create network namespaces: {error}"
    finally:
        if (_FOLDER / name).exists():
            _ip("netns", "delete", name)
    return None


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _remove_left() -> None:
    """Remove the namespaces of runs whose process is gone."""
    for left in _FOLDER.glob(f"{_PREFIX}*") if _FOLDER.is_dir() else ():
        process = left.name.removeprefix(_PREFIX).partition("-")[0]
        if process.isdigit() and not Path("/proc", process).exists():
            _ip("netns", "delete", left.name)


def _within(namespace: Path, make: Any) -> Any:
    """Return what `make` makes in a namespace: on a thread, since the namespace is that of one thread."""
    made: Sequence[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        nonlocal made
        try:
            with namespace.open() as file:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(file.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            made = [make()]
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]
