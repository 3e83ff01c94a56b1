"""Several gateways on a control channel: subscriptions, disconnections, and the lease."""

import time

import pytest

from ares.engine.control import GatewayDisconnected, GatewayExpired
from ares.protocol import messages, rpc
from tests.engine.control_channel import HELLO, Gateway, Instance, subscribed, until

pytestmark = pytest.mark.timeout(20)


def test_a_silent_gateway_is_disconnected(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "SUBSCRIPTION_TTL_S", 0.1)
    gateway = subscribed(instance, "silent")
    assert instance.commands(1) == [GatewayDisconnected("silent")]
    before = instance.taken
    monkeypatch.setattr(rpc, "SUBSCRIPTION_TTL_S", 10.0)
    gateway.send(messages.Subscribe(0.01, "silent"))
    # It receives a Hello again, since it may have missed a restart.
    assert gateway.receive_a(messages.Hello) == HELLO
    until(lambda: "silent" not in instance.channel.disconnected and instance.taken > before)
    gateway.close()


def test_a_gateway_that_wants_no_telemetry_is_disconnected_too(
    instance: Instance, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "SUBSCRIPTION_TTL_S", 0.1)
    gateway.send(messages.Subscribe(float("inf"), "silent"))
    assert gateway.receive() == HELLO
    assert instance.commands(1) == [GatewayDisconnected("silent")]


def test_a_heartbeat_keeps_a_subscription(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "SUBSCRIPTION_TTL_S", 0.3)
    gateway = subscribed(instance, "alive")
    began = time.monotonic()
    while time.monotonic() - began < 0.6:
        gateway.send(messages.Subscribe(0.05, "alive"))
        assert isinstance(gateway.receive(), messages.Telemetry)
    assert not instance.channel.waiting
    gateway.close()


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
    for _ in range(30):  # telemetry after which the closed connection has been noticed
        new.receive_a(messages.Telemetry)
    assert instance.channel.disconnected == {}
    assert not instance.channel.waiting
    new.close()
    assert instance.commands(1) == [GatewayDisconnected("one")]


def test_a_subscriber_without_a_name_is_just_forgotten(instance: Instance) -> None:
    subscribed(instance, "").close()

    def no_more_telemetry() -> bool:
        before = instance.taken
        time.sleep(0.1)  # ten times its interval
        return instance.taken == before

    until(no_more_telemetry)
    assert instance.channel.disconnected == {}
    assert not instance.channel.waiting


def test_the_number_of_disconnected_gateways_is_bounded(instance: Instance) -> None:
    gateways = [subscribed(instance, f"gateway-{n}", 0.2) for n in range(257)]
    for gateway in gateways:
        gateway.close()
    commands = instance.commands(257)
    names = [command.gateway for command in commands if isinstance(command, GatewayDisconnected)]
    assert sorted(names) == sorted(f"gateway-{n}" for n in range(257))
    assert list(instance.channel.disconnected) == names[1:]
