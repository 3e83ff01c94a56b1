"""What `ares worker` refuses before it starts vLLM."""

import socket
import time
from typing import Any

import pytest

from ares.addresses import AddressError, check, on_loopback
from ares.engine import identity as instance
from ares.engine import launcher
from ares.engine.learning.flags import LearningError, LearningFlags
from ares.free_ports import free_port

HOST = "127.0.0.1"
WORKER: dict[str, Any] = {"model": "no/model", "role": "decode", "name": "decode-0", "host": HOST}


@pytest.mark.parametrize("flag", ["port", "control_port", "nixl_port"])
def test_a_taken_port_is_refused_at_once(flag: str) -> None:
    """vLLM would wait for ever for a side channel that cannot be bound, and share an HTTP port."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        settings = launcher.WorkerSettings(**{"port": 0, flag: port}, **WORKER)
        message = f"{HOST}:{port} is in use: .* choose another --{flag.replace('_', '-')}"
        began = time.monotonic()
        with pytest.raises(AddressError, match=message):
            launcher.serve(settings)
        assert time.monotonic() - began < 1


def test_a_port_has_one_use() -> None:
    port = free_port(HOST)
    with pytest.raises(AddressError, match=f"--port and --nixl-port both want port {port}"):
        launcher.serve(launcher.WorkerSettings(port=port, nixl_port=port, **WORKER))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"record_fraction": 0.5}, launcher.LaunchError, "--record-fraction changes nothing without --record-hidden"),
        (
            {"learning": LearningFlags(record_at_once=4)},
            LearningError,
            "--record-at-once changes nothing without --lea",
        ),
        ({"learning": LearningFlags(learn=True), "predictor": "none"}, LearningError, "contradict each other"),
        (
            {"predictor": "learn", "vllm_flags": ("--worker-cls", "x.Y")},
            LearningError,
            "--worker-cls and --learn exclude each other",
        ),
        (
            {"predictor": "a.safetensors", "vllm_flags": ("--worker-cls", "x.Y")},
            launcher.LaunchError,
            "--worker-cls and a predictor or recorder exclude each other",
        ),
    ],
)
def test_what_would_record_or_predict_nothing_is_refused(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        launcher.serve(launcher.WorkerSettings(port=0, **WORKER, **given))


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


@pytest.mark.parametrize("advertise_host", ["0.0.0.0", "::", "127.0.0.1"])  # noqa: S104 - names
def test_an_address_that_others_cannot_connect_to_is_refused(
    advertise_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARES_CONTROL_KEY", "k" * 32)
    settings = {**WORKER, "host": "0.0.0.0", "advertise_host": advertise_host}  # noqa: S104 - what it is about
    with pytest.raises(AddressError, match=f"--advertise-host {advertise_host} .*give the address of this machine"):
        launcher.serve(launcher.WorkerSettings(port=0, **settings))


@pytest.mark.parametrize(
    ("listen_host", "endpoint", "own"),
    [
        ("0.0.0.0", "0.0.0.0", "127.0.0.1"),  # noqa: S104 - what it is about
        ("::", "[::]", "[::1]"),
        ("10.0.0.1", "10.0.0.1", "10.0.0.1"),
        ("", "192.0.2.1", "192.0.2.1"),
    ],
)
def test_what_is_listened_on_and_what_is_published(listen_host: str, endpoint: str, own: str) -> None:
    settings = instance.InstanceSettings("d", "decode", "b", "tcp://192.0.2.1:5600", listen_host=listen_host)
    assert settings.published_host == "192.0.2.1"
    assert settings.control_endpoint == f"tcp://{endpoint}:5600"
    assert settings.own_control_address == f"tcp://{own}:5600"
    assert not settings.on_loopback
    assert instance.describe(settings, [], None).control_address == "tcp://192.0.2.1:5600"


def test_a_name_with_another_address_too_is_not_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(socket.AF_INET, 1, 6, "", ("127.0.0.1", 0)), (socket.AF_INET6, 1, 6, "", ("2001:db8::1", 0, 0, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    assert not on_loopback("both")


def test_an_ipv6_address_has_free_ports_and_brackets() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    port = free_port("::1")
    check("::1", {"--control-port": [port]})
    assert instance.control_address("::1", port) == f"tcp://[::1]:{port}"
    with socket.create_server(("::1", port), family=socket.AF_INET6):
        assert port != free_port("::1")
