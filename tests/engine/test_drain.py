"""The process that serves an instance's HTTP, at the instance's control channel."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from ares.engine.drain import OwnControlChannel
from ares.protocol import messages
from tests.engine.control_channel import Gateway, Instance
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def own(instance: Instance) -> AsyncIterator[OwnControlChannel]:
    made = OwnControlChannel(instance.address, None)
    following = asyncio.create_task(made.follow())
    await eventually(lambda: made.telemetry is not None)
    yield made
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following


async def test_a_message_that_is_too_large_is_dropped(instance: Instance, own: OwnControlChannel) -> None:
    rows = [messages.Row("x" * (1 << 20), 1, 1, "running") for _ in range(5)]
    large = messages.Telemetry(1 << 40, 0, 0, 0, 0, 0.0, 0, 0, rows)  # only its size is wrong
    before = instance.taken
    instance.channel.post(large)
    await eventually(lambda: own.telemetry is not None and own.telemetry.sequence > before + 2)
    assert own.telemetry is not None
    assert own.telemetry.sequence < 1 << 40


async def test_gateways_leave_before_the_instance_ends(instance: Instance, own: OwnControlChannel) -> None:
    gateway = Gateway(instance.address)
    gateway.send(messages.Subscribe(0.02))
    draining = asyncio.create_task(own.drain(8.0))
    try:
        await eventually(lambda: own.telemetry is not None and own.telemetry.draining)
        while not (load := gateway.receive_a(messages.Telemetry)).draining:
            pass
        assert load.drain_left_s is not None
        assert 3.0 < load.drain_left_s <= 6.0
    finally:
        gateway.close()
        await draining  # nothing is left
