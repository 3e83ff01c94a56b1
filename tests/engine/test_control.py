"""The instance's end of the control channel, with a plain ZeroMQ gateway at the other end."""

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
import zmq

from ares.engine.control import ControlChannel, EngineCommand, GatewayDisconnected, GatewayExpired
from ares.protocol import messages, rpc
from ares.protocol.keys import ControlKey

pytestmark = pytest.mark.timeout(20)
T = TypeVar("T")
HELLO = messages.Hello("d0", "decode", "boot", messages.Peer("e", "h", 1), 16, 100, 4096, {})


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


class Gateway:
    """One subscriber."""

    def __init__(self, address: str, secure: Callable[[zmq.Socket], None] = lambda _: None) -> None:  # type: ignore[type-arg]
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        secure(self._socket)
        self._socket.connect(address)

    def send(self, command: messages.Command) -> None:
        self._socket.send(rpc.encode(command))

    def send_frames(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def receive(self, timeout_s: float = 5.0) -> messages.Event | None:
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        return rpc.decode_event(self._socket.recv())

    def receive_a(self, kind: type[T]) -> T:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            event = self.receive(1.0)
            if isinstance(event, kind):
                return event
        raise AssertionError(f"no {kind.__name__}")

    def close(self) -> None:
        self._socket.close()


class Instance:
    """A channel and what it reads."""

    def __init__(self, key: ControlKey | None = None) -> None:
        self.address = free_address()
        self.snapshots = itertools.count(1)
        self.taken = 0
        self.failing = False
        self.channel = ControlChannel(self.address, HELLO, self._snapshot, key=key)

    def _snapshot(self) -> messages.Telemetry:
        self.taken = next(self.snapshots)
        if self.failing:
            raise RuntimeError("the scheduler changed while it was read")
        return messages.Telemetry(self.taken, 0, 0, 0, 0, 0.0, 0, 0, [])

    def commands(self, count: int) -> list[EngineCommand]:
        found: list[EngineCommand] = []
        until(lambda: bool(found.extend(command for _, command in self.channel.commands()) or len(found) >= count))
        return found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def gateway(instance: Instance) -> Iterator[Gateway]:
    made = Gateway(instance.address)
    yield made
    made.close()


def test_a_subscriber_hears_hello_and_then_telemetry(instance: Instance, gateway: Gateway) -> None:
    assert gateway.receive(0.05) is None
    gateway.send(messages.Subscribe(0.02))
    assert gateway.receive() == HELLO
    began = time.monotonic()
    heard = [gateway.receive() for _ in range(10)]
    assert all(isinstance(event, messages.Telemetry) for event in heard)
    assert time.monotonic() - began > 0.1
    # A heartbeat is no new subscription.
    gateway.send(messages.Subscribe(0.02))
    assert all(isinstance(gateway.receive(), messages.Telemetry) for _ in range(5))


@pytest.mark.parametrize("interval_s", [0.0, -1.0, float("nan"), float("inf"), 1e-9])
def test_an_unreasonable_interval_is_limited(instance: Instance, gateway: Gateway, interval_s: float) -> None:
    gateway.send(messages.Subscribe(interval_s))
    assert gateway.receive() == HELLO
    before, began = instance.taken, time.monotonic()
    until(lambda: time.monotonic() - began > 0.2)
    assert instance.taken - before < 40
    gateway.send(messages.Cut(1, "x"))
    assert instance.commands(1) == [messages.Cut(1, "x")]


def test_a_silent_subscriber_is_forgotten(
    instance: Instance, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "SUBSCRIPTION_TTL_S", 0.1)
    gateway.send(messages.Subscribe(0.01))
    gateway.receive_a(messages.Telemetry)
    until(lambda: not instance.channel._subscribers)
    before = instance.taken
    gateway.send(messages.Subscribe(0.01))
    # It receives a Hello again, since it may have missed a restart.
    assert gateway.receive_a(messages.Hello) == HELLO
    until(lambda: instance.taken > before)


def test_a_subscriber_without_telemetry_is_forgotten_too(
    instance: Instance, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "SUBSCRIPTION_TTL_S", 0.1)
    gateway.send(messages.Subscribe(float("inf")))
    assert gateway.receive() == HELLO
    until(lambda: not instance.channel._subscribers)


def test_a_heartbeat_keeps_a_subscription(
    instance: Instance, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "SUBSCRIPTION_TTL_S", 0.3)
    began = time.monotonic()
    while time.monotonic() - began < 0.6:
        gateway.send(messages.Subscribe(0.05))
        gateway.receive_a(messages.Telemetry)
    assert len(instance.channel._subscribers) == 1


def test_malformed_messages_are_ignored(instance: Instance, gateway: Gateway) -> None:
    for frames in (
        [b""],
        [b"\xc1\xff"],
        [b"a", b"b", b"c"],
        [b"", rpc.encode(messages.Cut(1, "x"))],
        [msgspec.msgpack.encode({"type": "run"})],
        [rpc.encode(HELLO)],
    ):
        gateway.send_frames(*frames)
    gateway.send(messages.Cut(2, "y"))
    assert instance.commands(1) == [messages.Cut(2, "y")]


def test_a_message_that_is_too_large_does_not_arrive(instance: Instance, gateway: Gateway) -> None:
    other = Gateway(instance.address)
    other.send(messages.Subscribe(0.02))
    assert other.receive() == HELLO
    gateway.send(messages.Subscribe(0.02))
    assert gateway.receive() == HELLO
    gateway.send(messages.Release("x" * (5 << 20)))  # but for its size it would be taken
    # Only its own connection is closed, and made anew.
    until(lambda: len(instance.channel._subscribers) == 1)
    gateway.send(messages.Release("after"))
    other.send(messages.Release("other"))
    assert {command.key for command in instance.commands(2) if isinstance(command, messages.Release)} == {
        "after",
        "other",
    }
    assert isinstance(other.receive(), messages.Telemetry)
    # What fits is taken, nearly as large as it is.
    gateway.send(messages.Release("x" * (4 << 20 - 1)))
    assert len(instance.commands(1)) == 1
    other.close()


def test_telemetry_that_fails_does_not_end_the_channel(instance: Instance, gateway: Gateway) -> None:
    instance.failing = True
    gateway.send(messages.Subscribe(0.02))
    assert gateway.receive() == HELLO
    before, began = instance.taken, time.monotonic()
    until(lambda: time.monotonic() - began > 0.3)
    # It is tried at its interval, not as fast as the processor can.
    assert 1 <= instance.taken - before <= 20
    gateway.send(messages.Release("x"))
    assert instance.commands(1) == [messages.Release("x")]
    instance.channel.post(messages.KvReceived("k", 3, failed=False))
    assert gateway.receive() == messages.KvReceived("k", 3, failed=False)
    instance.failing = False
    assert isinstance(gateway.receive(), messages.Telemetry)


def test_many_commands_keep_their_order(instance: Instance, gateway: Gateway) -> None:
    wanted: list[messages.Command] = [messages.Cut(n, f"request/{n}") for n in range(3000)]
    for command in wanted:
        gateway.send(command)
    assert instance.commands(3000) == wanted
    assert instance.channel.waiting is False


def test_answers_go_to_the_sender_and_other_events_to_all_subscribers(instance: Instance, gateway: Gateway) -> None:
    other = Gateway(instance.address)
    for subscriber in (gateway, other):
        subscriber.send(messages.Subscribe(10))
        assert subscriber.receive() == HELLO
        subscriber.receive_a(messages.Telemetry)
    gateway.send(messages.Cut(1, "x"))
    until(lambda: instance.channel.waiting)
    ((sender, _),) = instance.channel.commands()
    answer = messages.CutResult(1, "x", "unknown")
    instance.channel.post(answer, sender)
    instance.channel.post(messages.KvReceived("x", 0, failed=False))
    assert gateway.receive() == answer
    assert gateway.receive() == other.receive() == messages.KvReceived("x", 0, failed=False)
    other.close()


def test_an_event_is_sent_at_once(instance: Instance, gateway: Gateway) -> None:
    gateway.send(messages.Subscribe(10))
    gateway.receive_a(messages.Telemetry)
    began = time.monotonic()
    instance.channel.post(messages.KvReceived("x", 0, failed=False))
    assert gateway.receive_a(messages.KvReceived)
    assert time.monotonic() - began < 0.3  # the thread would sleep longer


def test_a_gateway_that_reads_nothing_does_not_delay_others(instance: Instance, gateway: Gateway) -> None:
    gateway.send(messages.Subscribe(10))
    gateway.receive_a(messages.Telemetry)
    for number in range(5000):
        instance.channel.post(messages.CutResult(number, "x" * 100, "finished", tail=[1] * 64))
    other = Gateway(instance.address)
    other.send(messages.Subscribe(0.02))
    assert other.receive_a(messages.Hello) == HELLO
    other.close()


def test_close_ends_the_thread_and_frees_the_address() -> None:
    instance = Instance()
    instance.channel.close()
    assert not instance.channel._thread.is_alive()
    assert "ares-control" not in {
        t.name for t in threading.enumerate() if t is instance.channel._thread and t.is_alive()
    }
    until = time.monotonic() + 20
    while True:  # ZeroMQ gives the port back in a thread of its own
        try:
            ControlChannel(instance.address, HELLO, instance._snapshot).close()
            return
        except zmq.ZMQError:
            assert time.monotonic() < until, "the address is still taken"
            time.sleep(0.01)


def test_close_does_not_write_to_a_file_that_its_thread_has_closed() -> None:
    """The thread may end between the flag that stops it and the wake-up that follows."""
    instance = Instance()
    wake, thread = instance.channel._wake, instance.channel._thread
    instance.channel._stopping = True
    os.eventfd_write(wake, 1)
    thread.join(5)
    assert not thread.is_alive()
    os.eventfd_write(wake, 1)  # still ours
    os.close(wake)


def test_nothing_fails_after_close() -> None:
    instance = Instance()
    gateway = Gateway(instance.address)
    gateway.send(messages.Subscribe(0.01))
    gateway.receive_a(messages.Telemetry)
    instance.channel.close()
    instance.channel.post(messages.KvReceived("x", 0, failed=False))
    instance.channel.close()
    assert instance.channel.commands() == []
    gateway.close()


def test_a_taken_address_is_an_error(instance: Instance) -> None:
    with pytest.raises(zmq.ZMQError):
        ControlChannel(instance.address, HELLO, instance._snapshot)


def test_all_subscribers_see_a_drain_until_it_is_revoked(instance: Instance) -> None:
    operator, other = Gateway(instance.address), Gateway(instance.address)
    for gateway in (operator, other):
        gateway.send(messages.Subscribe(0.01))
        assert not gateway.receive_a(messages.Telemetry).draining
    operator.send(messages.Drain(True))
    for gateway in (operator, other):
        while not gateway.receive_a(messages.Telemetry).draining:
            pass
    other.send(messages.Drain(False))
    while operator.receive_a(messages.Telemetry).draining:
        pass
    assert not instance.channel.waiting, "it is not for the engine thread"
    for gateway in (operator, other):
        gateway.close()


def test_all_subscribers_see_the_deadline_of_a_drain(instance: Instance) -> None:
    operator, other = Gateway(instance.address), Gateway(instance.address)
    for gateway in (operator, other):
        gateway.send(messages.Subscribe(0.01))
        assert gateway.receive_a(messages.Telemetry).drain_left_s is None

    def draining(gateway: Gateway) -> messages.Telemetry:
        while not (load := gateway.receive_a(messages.Telemetry)).draining:
            pass
        return load

    operator.send(messages.Drain(True, 0.5))
    first = draining(other).drain_left_s
    assert first is not None
    assert 0.2 < first <= 0.5
    began = time.monotonic()
    while other.receive_a(messages.Telemetry).drain_left_s != 0.0:
        assert time.monotonic() - began < 5
    # The newest command counts: without a deadline, the drain has no end.
    operator.send(messages.Drain(True))
    while other.receive_a(messages.Telemetry).drain_left_s is not None:
        assert time.monotonic() - began < 10
    assert instance.channel.draining
    operator.send(messages.Drain(False, 5.0))
    while (load := other.receive_a(messages.Telemetry)).draining:
        pass
    assert load.drain_left_s is None
    for gateway in (operator, other):
        gateway.close()


# --- several gateways ---


def subscribed(instance: Instance, name: str, interval_s: float = 0.01) -> Gateway:
    made = Gateway(instance.address)
    made.send(messages.Subscribe(interval_s, name))
    made.receive_a(messages.Telemetry)
    return made


def test_the_lease_needs_no_engine(instance: Instance) -> None:
    gateways = [subscribed(instance, name, 10) for name in ("a", "b")]
    answers = []
    for call, gateway in enumerate(gateways):
        gateway.send(messages.Lease(call, "ab"[call], 5.0))
        answers.append(gateway.receive_a(messages.LeaseResult))
    assert answers == [messages.LeaseResult(0, "a", granted=True), messages.LeaseResult(1, "a", granted=False)]
    assert not instance.channel.waiting
    gateways[0].send(messages.Lease(2, "a", 0.0))
    assert gateways[0].receive_a(messages.LeaseResult) == messages.LeaseResult(2, "", granted=True)
    gateways[1].send(messages.Lease(3, "b", 5.0))
    assert gateways[1].receive_a(messages.LeaseResult).granted
    for gateway in gateways:
        gateway.close()


def test_a_closed_connection_disconnects_its_gateway_at_once(instance: Instance) -> None:
    dies, stays = subscribed(instance, "dies"), subscribed(instance, "stays")
    dies.send(messages.Lease(1, "dies", 10.0))
    assert dies.receive_a(messages.LeaseResult).granted
    began = time.monotonic()
    dies.close()
    assert instance.commands(1) == [GatewayDisconnected("dies")]
    assert time.monotonic() - began < rpc.SUBSCRIPTION_TTL_S / 2  # not by its silence
    assert "dies" in instance.channel.disconnected
    stays.send(messages.Lease(2, "stays", 1.0))
    assert stays.receive_a(messages.LeaseResult).granted
    stays.receive_a(messages.Telemetry)
    stays.close()


def test_a_silent_gateway_is_disconnected(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "SUBSCRIPTION_TTL_S", 0.1)
    gateway = subscribed(instance, "silent")
    assert instance.commands(1) == [GatewayDisconnected("silent")]
    monkeypatch.setattr(rpc, "SUBSCRIPTION_TTL_S", 10.0)
    gateway.send(messages.Subscribe(0.01, "silent"))
    gateway.receive_a(messages.Hello)
    until(lambda: "silent" not in instance.channel.disconnected)
    gateway.close()


def test_a_disconnected_gateway_expires_once(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "GATEWAY_EXPIRY_S", 0.3)
    began = time.monotonic()
    subscribed(instance, "dies").close()
    assert instance.commands(1) == [GatewayDisconnected("dies")]
    assert instance.commands(1) == [GatewayExpired("dies")]
    assert time.monotonic() - began > 0.3
    time.sleep(1.2)  # twice the longest sleep of the thread
    assert not instance.channel.waiting


def test_a_gateway_that_connects_again_in_time_does_not_expire(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "GATEWAY_EXPIRY_S", 1.0)
    subscribed(instance, "back").close()
    assert instance.commands(1) == [GatewayDisconnected("back")]
    again = subscribed(instance, "back")
    time.sleep(1.7)
    assert not instance.channel.waiting
    again.close()
    assert instance.commands(2) == [GatewayDisconnected("back"), GatewayExpired("back")]


def test_a_gateway_with_another_connection_is_not_disconnected(instance: Instance) -> None:
    old, new = subscribed(instance, "one"), subscribed(instance, "one")
    old.close()
    until(lambda: len(instance.channel._subscribers) == 1)
    assert instance.channel.disconnected == {}
    assert not instance.channel.waiting
    new.close()
    assert instance.commands(1) == [GatewayDisconnected("one")]


def test_a_subscriber_without_a_name_is_just_forgotten(instance: Instance) -> None:
    subscribed(instance, "").close()
    until(lambda: not instance.channel._subscribers)
    assert instance.channel.disconnected == {}
    assert not instance.channel.waiting


def test_the_number_of_disconnected_gateways_is_bounded(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ares.engine.control._MAX_DISCONNECTED", 2)
    for name in ("a", "b", "c"):
        subscribed(instance, name).close()
        assert instance.commands(1) == [GatewayDisconnected(name)]
    assert list(instance.channel.disconnected) == ["b", "c"]


KEY = ControlKey("k" * 32)


def without_a_key(_: zmq.Socket) -> None:  # type: ignore[type-arg]
    """Connect as to an open channel."""


def with_another_key(socket: zmq.Socket) -> None:  # type: ignore[type-arg]
    ControlKey("j" * 32).connect(socket)


def with_the_public_key_only(socket: zmq.Socket) -> None:  # type: ignore[type-arg]
    """Connect to the right server key with another client key, which only an authenticator refuses."""
    KEY.connect(socket)
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()


def test_a_connection_with_the_key_is_accepted() -> None:
    instance = Instance(KEY)
    gateway = Gateway(instance.address, KEY.connect)
    try:
        gateway.send(messages.Subscribe(0.02))
        assert gateway.receive() == HELLO
        gateway.send(messages.Release("mine"))
        assert instance.commands(1) == [messages.Release("mine")]
        assert instance.channel.refused == 0
    finally:
        gateway.close()
        instance.channel.close()


@pytest.mark.parametrize("secure", [without_a_key, with_another_key, with_the_public_key_only])
def test_a_connection_without_the_key_sends_and_receives_nothing(
    secure: Callable[[zmq.Socket], None],  # type: ignore[type-arg]
    caplog: pytest.LogCaptureFixture,
) -> None:
    instance = Instance(KEY)
    stranger = Gateway(instance.address, secure)
    try:
        stranger.send(messages.Subscribe(0.01))
        stranger.send(messages.Drain(True))
        stranger.send(messages.Release("somebody's"))
        until(lambda: instance.channel.refused > 0)
        assert stranger.receive(0.1) is None
        assert not instance.channel.draining
        assert not instance.channel.waiting
        assert instance.taken == 0
    finally:
        stranger.close()
        instance.channel.close()
    assert "refused 1 connections" in caplog.text
    assert "kkkk" not in caplog.text


def test_a_gateway_with_a_key_does_not_talk_to_an_open_channel(instance: Instance) -> None:
    gateway = Gateway(instance.address, KEY.connect)
    try:
        gateway.send(messages.Subscribe(0.01))
        until(lambda: instance.channel.refused > 0)
        assert instance.taken == 0
    finally:
        gateway.close()


def nothing_left_behind() -> None:
    """Count threads and files over channels with a key; in a process of its own, where nothing else opens any."""
    Instance(KEY).channel.close()
    threads, files = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        Instance(KEY).channel.close()
    until(lambda: threading.active_count() <= threads)
    until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= files)


def test_a_channel_with_a_key_leaves_nothing_behind() -> None:
    script = "from tests.engine.test_control import nothing_left_behind; nothing_left_behind()"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
