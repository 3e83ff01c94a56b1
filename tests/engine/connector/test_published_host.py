"""An instance that listens on every address publishes one that others can connect to."""

import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from ares.engine import identity
from ares.free_ports import free_port
from ares.protocol import messages
from tests.engine.connector.test_scheduler import Engine, configuration
from tests.engine.control_channel import Gateway

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

EVERY = "0.0.0.0"  # noqa: S104 - what it is about
# All of 127.0.0.0/8 is this machine: two addresses that are not the same.
PUBLISHED, ANOTHER = "127.0.0.7", "127.0.0.8"


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The scheduler side of an instance that listens on every address."""
    from ares.engine.connector.scheduler import Scheduler

    monkeypatch.setenv("ARES_INSTANCE", "")
    monkeypatch.delenv("ARES_CONTROL_KEY", raising=False)
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", EVERY)
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port(EVERY)))
    address = identity.control_address(PUBLISHED, free_port(EVERY))
    identity.export(identity.InstanceSettings("decode-0", "decode", "boot", address, listen_host=EVERY))
    config, cache = configuration()
    made = Scheduler(config, "engine", cache)
    yield made
    made.shutdown()


def test_the_control_channel_answers_everywhere_and_publishes_one_address(side: Any) -> None:
    port = urlsplit(identity.current().control_address).port
    for host in (PUBLISHED, ANOTHER):
        gateway = Gateway(identity.control_address(host, port or 0))
        gateway.send(messages.Subscribe(0.01, "gateway"))
        assert gateway.receive_a(messages.Hello).peer.host == PUBLISHED
        gateway.close()


@pytest.mark.parametrize(("published", "steps"), [("127.0.0.1", False), ("192.0.2.1", True)])
def test_an_idle_source_answers_pulls_over_tcp(published: str, steps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host without a GPU, where nothing but its steps polls NIXL; shared memory needs no answer."""
    monkeypatch.setenv("ARES_INSTANCE", "")
    monkeypatch.delenv("ARES_CONTROL_KEY", raising=False)
    engine = Engine(published)
    try:
        prefill = engine.add("gateway/1", 0, do_remote_decode=True)
        prefill.max_tokens = 1
        pinned, _ = engine.finish(prefill)
        assert pinned
        assert engine.side.has_pending_push_work() == steps
    finally:
        engine.side.shutdown()


def test_the_side_channel_answers_everywhere_and_publishes_one_address(side: Any) -> None:
    side.set_xfer_handshake_metadata({})
    port = side.side_channel_port
    for host in (PUBLISHED, ANOTHER):
        socket.create_connection((host, port), timeout=5).close()
    assert side.side_channel_host == PUBLISHED  # into kv_transfer_params
