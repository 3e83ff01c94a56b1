"""Commands and events of a control channel: each arrives once, in order, and a bad one harms none."""

import time

import msgspec
import pytest

from ares.engine.control import GatewayDisconnected
from ares.protocol import messages, rpc
from tests.engine.control_channel import HELLO, Gateway, Instance, until

pytestmark = pytest.mark.timeout(20)


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
    gateway.send(messages.Subscribe(0.02, "large"))
    assert gateway.receive() == HELLO
    gateway.send(messages.Release("x" * (5 << 20)))  # but for its size it would be taken
    # Only its own connection is closed, and made anew.
    assert instance.commands(1) == [GatewayDisconnected("large")]
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
