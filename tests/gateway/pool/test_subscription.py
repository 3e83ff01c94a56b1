"""What an instance keeps for a gateway is trusted only while nothing can have come between them."""

import pytest

from ares.gateway.pool.subscription import Subscription
from ares.protocol import messages, rpc


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("ares.gateway.pool.subscription.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def subscription(clock: Clock) -> Subscription:
    """One that has been answered."""
    made = Subscription("gateway", 0.1)
    made.begin()
    assert made.heartbeat() == rpc.encode(messages.Subscribe(0.1, "gateway"))
    made.received(greeting=True)
    return made


def live(subscription: Subscription, clock: Clock, seconds: float) -> None:
    """Let time pass as it does for a gateway that is well."""
    for _ in range(round(seconds / 0.5)):
        clock.now += 0.5
        subscription.heartbeat()
        subscription.received(greeting=False)


def test_it_lasts_while_both_speak(subscription: Subscription, clock: Clock) -> None:
    since = subscription.number
    for _ in range(5):
        live(subscription, clock, 5)
        assert subscription.unbroken(since)


def test_heartbeats_are_five_a_lifetime(subscription: Subscription, clock: Clock) -> None:
    assert subscription.heartbeat() is None
    clock.now += rpc.SUBSCRIPTION_TTL_S / 5 + 0.01
    assert subscription.heartbeat() is not None
    assert subscription.heartbeat() is None


def test_an_instance_that_is_not_heard_may_have_forgotten_us(subscription: Subscription, clock: Clock) -> None:
    since = subscription.number
    for _ in range(10):
        clock.now += 0.5
        subscription.heartbeat()
    assert not subscription.unbroken(since)
    # It was only slow: it still knows us.
    subscription.received(greeting=False)
    assert subscription.unbroken(since)


def test_an_instance_that_says_hello_again_has_forgotten_us(subscription: Subscription, clock: Clock) -> None:
    since = subscription.number
    live(subscription, clock, 1)
    subscription.received(greeting=True)
    assert not subscription.unbroken(since)
    assert subscription.unbroken(subscription.number)


def test_a_gateway_that_was_frozen_does_not_know(subscription: Subscription, clock: Clock) -> None:
    since = subscription.number
    clock.now += 15
    subscription.received(greeting=False)  # what had come meanwhile
    assert not subscription.unbroken(since)
    subscription.heartbeat()
    subscription.received(greeting=False)
    assert not subscription.unbroken(since)
    assert subscription.unbroken(subscription.number)


def test_another_connection_is_another_subscription(subscription: Subscription) -> None:
    since = subscription.number
    subscription.begin()
    assert subscription.heartbeat() is not None
    assert not subscription.unbroken(since)
