"""Ports that cannot be listened on, said in one sentence."""

import os
import socket

import pytest

from ares import addresses
from ares.addresses import AddressError
from ares.free_ports import free_port, free_ports

HOST = "127.0.0.1"


def refused(host: str, port: int, flag: str = "--port") -> str:
    with pytest.raises(AddressError) as failed:
        addresses.check(host, {flag: [port]})
    assert "\n" not in str(failed.value)
    return str(failed.value)


@pytest.mark.parametrize("shared", [False, True])
def test_a_taken_port_names_address_and_flag(shared: bool) -> None:
    """Also where who listens would share it, as vLLM's HTTP server would."""
    with socket.create_server((HOST, 0), reuse_port=shared) as taken:
        port = taken.getsockname()[1]
        said = f"{HOST}:{port} is in use: stop the process that listens there, or choose another --nixl-port"
        assert refused(HOST, port, "--nixl-port") == said
    addresses.check(HOST, {"--nixl-port": [port]})
    with socket.create_server((HOST, port)):
        pass  # what was checked is left free


def test_every_port_of_a_row_is_looked_at() -> None:
    last = free_ports(HOST, 2) + 1
    expected = pytest.raises(AddressError, match=f"{HOST}:{last} is in use.*--control-port")
    with socket.create_server((HOST, last)), expected:
        addresses.check(HOST, {"--port": [0], "--control-port": range(last - 1, last + 1)})


def test_a_connection_that_has_just_ended_does_not_hold_its_port() -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection((HOST, port)):
            server.accept()[0].close()  # closes first: its side waits for what may still be on its way (TIME_WAIT)
    addresses.check(HOST, {"--port": [port]})


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "2001:db8::1", "x" * 70])
def test_a_host_that_is_not_here(host: str) -> None:
    assert host in (said := refused(host, 8000))
    assert "address of this machine" in said


def test_a_port_that_is_none() -> None:
    assert refused(HOST, 65536) == "--port 65536 is no port: give one from 1 to 65535"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may listen everywhere")
def test_a_port_of_the_system() -> None:
    assert "no permission" in refused(HOST, 80)


def test_two_flags_with_one_port() -> None:
    port = free_port(HOST)
    with pytest.raises(AddressError, match=f"--port and --control-port both want port {port}"):
        addresses.check(HOST, {"--port": range(port - 1, port + 1), "--control-port": [port, port + 1]})


def test_a_reserved_port_is_free_afterwards() -> None:
    port = free_port(HOST)
    with addresses.reserved(HOST, port), pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port))
    with socket.create_server((HOST, port)), pytest.raises(AddressError), addresses.reserved(HOST, port):
        pytest.fail("it is taken")


def test_an_ipv6_address_has_brackets() -> None:
    assert addresses.with_port("::1", 80) == "[::1]:80"
    assert addresses.with_port("a.b", 80) == "a.b:80"
