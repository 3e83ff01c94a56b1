"""What `ares worker` refuses before it starts vLLM."""

import socket
import threading
from collections.abc import Iterator

import pytest

from ares.engine import launcher

HOST = "127.0.0.1"


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """A port that somebody listens on."""
    with socket.create_server((HOST, 0)) as server:
        yield server


@pytest.mark.parametrize("flag", ["control_port", "nixl_port"])
def test_a_taken_port_is_an_error_that_names_the_flag(
    taken: socket.socket, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would wait for ever for a side channel that cannot be bound."""
    monkeypatch.setattr(launcher, "_PORT_WAIT_S", 0.2)
    port = taken.getsockname()[1]
    settings = launcher.WorkerSettings("model", "decode", "decode-0", HOST, 0, **{flag: port})
    with pytest.raises(launcher.LaunchError, match=rf"--{flag.replace('_', '-')} {port} on {HOST}: .*in use"):
        launcher.serve(settings)


def test_a_port_that_is_given_back_is_waited_for(taken: socket.socket) -> None:
    port = taken.getsockname()[1]
    threading.Timer(0.3, taken.close).start()
    launcher.check_port(HOST, port, "--nixl-port")
    with socket.create_server((HOST, port)):
        pass  # it is free, and was left free


def test_a_host_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_PORT_WAIT_S", 0.2)
    with pytest.raises(launcher.LaunchError, match=r"--nixl-port 5 on 192\.0\.2\.1"):
        launcher.check_port("192.0.2.1", 5, "--nixl-port")
