"""Telemetry over a control channel: to its subscribers, at their interval, with the state of a drain."""

import time

import pytest

from ares.protocol import messages
from tests.engine.control_channel import HELLO, Gateway, Instance, until

pytestmark = pytest.mark.timeout(20)


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


def test_an_announced_request_is_expected_at_once(instance: Instance) -> None:
    gateway = Gateway(instance.address)
    gateway.send(messages.Expect("gateway/1/2", 60.0))
    until(lambda: instance.channel.expected.until(0.0) > 0.0)
    assert not instance.channel.waiting, "the engine thread takes commands after it has scheduled"
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
