"""vLLM's KV events: what is read is kept, and sent to the gateways that follow."""

import time
import uuid
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from ares.engine.control import ControlChannel
from ares.engine.kv_events import KvEventLog, readable_endpoint
from ares.protocol import kv_events, messages, rpc
from tests.engine.control_channel import HELLO, Gateway, free_address, until

pytestmark = pytest.mark.timeout(30)


class Publisher:
    """Publishes as vLLM does."""

    def __init__(self, **limits: int) -> None:
        self.endpoint = f"inproc://{uuid.uuid4().hex}"
        self.socket = zmq.Context.instance().socket(zmq.PUB)
        self.socket.bind(self.endpoint)
        self.log = KvEventLog(self.endpoint, "topic", **limits)
        self.number = 0

    def publish(self, *batches: bytes) -> None:
        for batch in batches:
            self.socket.send_multipart((b"topic", self.number.to_bytes(8, "big"), batch))
            self.number += 1

    def read(self) -> list[messages.KvEvents]:
        found: list[messages.KvEvents] = []
        until(lambda: bool(found.extend(map(message, self.log.read())) or found))
        return found


def message(body: bytes) -> messages.KvEvents:
    event = rpc.decode_event(body)
    assert isinstance(event, messages.KvEvents)
    return event


@pytest.fixture
def publisher(request: pytest.FixtureRequest) -> Iterator[Publisher]:
    made = Publisher(**getattr(request, "param", {}))
    yield made
    made.log.close()
    made.socket.close()


@pytest.mark.parametrize(
    ("endpoint", "readable"),
    [
        ("inproc://here", "inproc://here"),
        ("ipc:///run/events", "ipc:///run/events"),
        ("tcp://*:5557", "tcp://127.0.0.1:5557"),
        ("tcp://[::]:5557", "tcp://[::1]:5557"),
        ("tcp://*:0", None),
        ("tcp://collector:5557", None),
        ("tcp://*", None),
    ],
)
def test_what_an_operator_has_configured_is_read_where_it_can_be(endpoint: str, readable: str | None) -> None:
    config: Any = SimpleNamespace(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint, topic="")
    assert readable_endpoint(config) == readable
    config.publisher = "null"
    assert readable_endpoint(config) is None
    assert readable_endpoint(None) is None


def test_batches_are_numbered_without_gaps_and_lost_ones_are_empty(publisher: Publisher) -> None:
    publisher.publish(b"a")
    publisher.number += 5
    publisher.publish(b"b")
    read = [batch for one in publisher.read() for batch in one.batches]
    until(lambda: bool(read.extend(b for body in publisher.log.read() for b in message(body).batches) or len(read) > 2))
    assert read == [b"a", b"", b"b"]
    assert [message(body) for body in publisher.log.since(1)] == [messages.KvEvents(1, 0, [b"", b"b"])]
    assert not list(publisher.log.since(3))


@pytest.mark.parametrize("publisher", [{"kept_bytes": 4400, "message_bytes": 2000}], indirect=True)
def test_what_is_kept_is_bounded_and_sent_in_parts(publisher: Publisher) -> None:
    publisher.publish(*(bytes([n]) * 1000 for n in range(10)), b"x" * 3000)
    until(lambda: bool(publisher.log.read() or True) and message(next(publisher.log.since(0))).sequence == 7)
    parts = [message(body) for body in publisher.log.since(0)]
    assert [(part.sequence, part.kept_from, len(part.batches)) for part in parts] == [(7, 7, 2), (9, 7, 2)]
    assert parts[-1].batches[-1] == b"", "a batch that is too large counts as lost"


def test_gateways_follow_from_where_they_want(publisher: Publisher) -> None:
    address = free_address()
    channel = ControlChannel(address, HELLO, lambda: None, kv_events=publisher.log)
    try:
        follower, other = Gateway(address), Gateway(address)
        publisher.publish(b"a", b"b")
        for gateway in (follower, other):
            gateway.send(messages.Subscribe(1.0, "gateway"))
            gateway.receive_a(messages.Hello)
        received = follow(follower, 1, lambda found: b"b" in found)
        assert received == [b"b"]
        publisher.publish(b"c")
        assert follower.receive_a(messages.KvEvents) == messages.KvEvents(2, 0, [b"c"])
        assert other.receive(0.05) is None, "only to those that follow"
        follower.close()
        other.close()
    finally:
        channel.close()


def test_a_gateway_that_asks_again_gets_one_part_at_a_time_and_new_batches_once_it_has_all(
    publisher: Publisher,
) -> None:
    address = free_address()
    channel = ControlChannel(address, HELLO, lambda: None, kv_events=publisher.log)
    large = bytes(100_000)
    try:
        publisher.publish(b"a", large, large, b"b")
        until(lambda: bool(publisher.log.read() or True) and publisher.log.part(4)[1])
        gateway = Gateway(address)
        gateway.send(messages.Subscribe(1.0, "gateway"))
        gateway.receive_a(messages.Hello)
        for since, batches in ((0, [b"a", large]), (2, [large, b"b"]), (4, [])):
            gateway.send(messages.FollowKvEvents(since, paced=True))
            assert gateway.receive_a(messages.KvEvents) == messages.KvEvents(since, 0, batches, end=4)
            if not since:
                assert gateway.receive(0.05) is None
        publisher.publish(b"c")
        assert gateway.receive_a(messages.KvEvents) == messages.KvEvents(4, 0, [b"c"])
        gateway.close()
    finally:
        channel.close()


def follow(gateway: Gateway, since: int, enough: Callable[[list[bytes]], bool]) -> list[bytes]:
    deadline, found = time.monotonic() + 5, list[bytes]()
    gateway.send(messages.FollowKvEvents(since))
    while not enough(found) and time.monotonic() < deadline:
        if isinstance(event := gateway.receive(1.0), messages.KvEvents):
            found += event.batches
    return found


@pytest.mark.engines
def test_it_reads_what_vllm_publishes() -> None:
    pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
    from vllm.config.kv_events import KVEventsConfig
    from vllm.distributed import kv_events as vllm_events

    config = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=f"inproc://{uuid.uuid4().hex}")
    endpoint = readable_endpoint(config)
    assert endpoint is not None
    publisher = vllm_events.EventPublisherFactory.create(config)
    log = KvEventLog(endpoint, config.topic)
    stored = vllm_events.BlockStored(
        [b"h"], None, [1, 2], 2, None, "GPU", "adapter", extra_keys=[("adapter", "salt")], group_idx=0
    )
    removed = vllm_events.BlockRemoved([b"h"], "GPU", 0)
    publisher.publish(vllm_events.KVEventBatch(1.5, [stored, removed, vllm_events.AllBlocksCleared()]))
    found: list[bytes] = []
    until(lambda: bool(found.extend(log.read()) or found))
    log.close()
    publisher.shutdown()
    (batch,) = message(found[0]).batches
    extra: list[list[Any] | None] = [["adapter", "salt"]]
    assert kv_events.decode(batch).events == [
        kv_events.BlockStored([b"h"], None, [1, 2], 2, "GPU", "adapter", extra, 0),
        kv_events.BlockRemoved([b"h"], "GPU", 0),
        kv_events.AllBlocksCleared(),
    ]
