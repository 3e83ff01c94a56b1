"""Which address an instance publishes, and which are refused in a sentence."""

import socket

import pytest

from ares import published_address
from ares.addresses import AddressError

EVERY = ("0.0.0.0", "::")  # noqa: S104 - names


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_HOST_IP", raising=False)


def without_network(monkeypatch: pytest.MonkeyPatch, name: str = "127.0.0.1") -> None:
    """No default route, and a host name that resolves to this."""
    real = socket.getaddrinfo

    def unreachable(*_: object) -> None:
        raise OSError("no route")

    def resolve(host: str | None, *rest: object, **more: object) -> object:
        return real(name if host == "this-machine" else host, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "gethostname", lambda: "this-machine")
    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def refused(host: str, advertise_host: str | None = None) -> str:
    with pytest.raises(AddressError) as failed:
        published_address.published(host, advertise_host)
    assert "\n" not in str(failed.value)
    return str(failed.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "::1", "2001:db8::1", "localhost"])
def test_an_address_of_its_own_is_published_as_it_is(host: str) -> None:
    assert published_address.published(host) == host


@pytest.mark.parametrize("host", EVERY)
def test_what_is_given_is_published_for_a_wildcard(host: str) -> None:
    assert published_address.published(host, "192.0.2.7") == "192.0.2.7"
    assert published_address.published(host, "2001:db8::7") == "2001:db8::7"


@pytest.mark.parametrize("host", EVERY)
def test_a_wildcard_has_the_address_of_the_default_route(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {socket.AF_INET: "192.0.2.8", socket.AF_INET6: "2001:db8::8"}
    monkeypatch.setattr(socket.socket, "connect", lambda *_: None)
    monkeypatch.setattr(socket.socket, "getsockname", lambda probe: (addresses[probe.family], 1))
    assert published_address.published(host) == addresses[socket.AF_INET6 if ":" in host else socket.AF_INET]


def test_without_a_default_route_it_is_what_the_host_name_resolves_to(monkeypatch: pytest.MonkeyPatch) -> None:
    without_network(monkeypatch, "192.0.2.9")
    assert published_address.published(EVERY[0]) == "192.0.2.9"


@pytest.mark.parametrize("host", EVERY)
def test_where_nothing_is_known_it_must_be_given(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_network(monkeypatch)
    assert "--advertise-host" in refused(host)


def test_vllms_variable_counts_before_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", "192.0.2.10")
    assert published_address.published(EVERY[0]) == "192.0.2.10"
    assert published_address.published(EVERY[0], "192.0.2.11") == "192.0.2.11"
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    assert "VLLM_HOST_IP 127.0.0.1 is loopback" in refused(EVERY[0])


@pytest.mark.parametrize("wrong", [*EVERY, "224.0.0.1", "fe80::1", "no such host", "x" * 70, "a..b"])
def test_what_nobody_can_connect_to_is_refused(wrong: str) -> None:
    said = refused(EVERY[0], wrong)
    assert said.startswith(f"--advertise-host {wrong} ")
    assert "such as 10.0.0.1" in said


@pytest.mark.parametrize("loopback", ["127.0.0.1", "::1", "localhost"])
@pytest.mark.parametrize("host", [*EVERY, "192.0.2.1"])
def test_loopback_is_not_published_for_other_hosts(host: str, loopback: str) -> None:
    said = refused(host, loopback)
    assert f"--advertise-host {loopback} is loopback" in said
    assert f"--host {host}" in said


def test_an_address_that_leads_nowhere_is_refused() -> None:
    said = refused("127.0.0.1", "192.0.2.1")
    assert "--host 127.0.0.1 listens on loopback only: give --host 192.0.2.1" in said


def test_this_machine_reaches_a_wildcard_by_loopback() -> None:
    assert [published_address.here(host) for host in (*EVERY, "192.0.2.1")] == ["127.0.0.1", "::1", "192.0.2.1"]
