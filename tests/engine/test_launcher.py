"""What `ares worker` refuses before it starts vLLM."""

import socket
import threading
from collections.abc import Iterator

import pytest

from ares.engine import instance, launcher
from ares.engine.defaults import free_port

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


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_loopback_needs_no_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARES_CONTROL_KEY", raising=False)
    launcher.check_control(host, insecure=False)
    settings = instance.InstanceSettings("d", "decode", "boot", instance.control_address(host, 5600))
    assert settings.on_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "no such host"])  # noqa: S104 - names
def test_any_other_host_needs_one(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARES_CONTROL_KEY", raising=False)
    with pytest.raises(launcher.LaunchError, match=r"--host|one key"):
        launcher.check_control(host, insecure=False)


def test_a_name_that_leads_out_as_well_is_not_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(socket.AF_INET, 1, 6, "", ("127.0.0.1", 0)), (socket.AF_INET6, 1, 6, "", ("2001:db8::1", 0, 0, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    assert not instance.on_loopback("both")


def test_an_ipv6_address_has_free_ports_and_brackets() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    port = free_port("::1")
    launcher.check_port("::1", port, "--control-port")
    assert instance.control_address("::1", port) == f"tcp://[::1]:{port}"
    with socket.create_server(("::1", port), family=socket.AF_INET6):
        assert port != free_port("::1")
