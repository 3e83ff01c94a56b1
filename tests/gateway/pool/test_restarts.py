"""Instances that come, go and come back under a gateway, and a gateway that stands still."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ares.gateway.service import COMMANDED, Gateway, TargetError
from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.gateways import (
    Client,
    configuration,
    find,
    finish,
    hold,
    other,
    started,
    stop_holding,
    view,
)
from tests.gateway.running import IMPATIENT, VOCABULARY
from tests.waiting import eventually


async def test_a_restart_is_noticed(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    instance = find(gateway, "decode-0")
    assert instance.state.hello is not None
    first = instance.state.hello.boot
    await fakes[1].die()
    await eventually(lambda: not instance.health.healthy)
    assert gateway.pool.ready  # the other one
    await fakes[1].start()
    await eventually(
        lambda: instance.health.healthy and instance.state.hello is not None and instance.state.hello.boot != first
    )
    # Everybody who may pull from it, or it from them, is introduced again.
    await eventually(lambda: fakes[1].boot in {peer.engine_id for peer in fakes[2].peers})
    await eventually(lambda: {fakes[0].boot, fakes[2].boot} <= {peer.engine_id for peer in fakes[1].peers})
    client = Client(gateway, 300)
    sequence = await client.reached(10)
    assert (await gateway.migrate(sequence, other(gateway, sequence), "test", COMMANDED)).outcome == "moved"
    await client.finish()
    client.check(300)


@pytest.mark.parametrize("preset", ["off", "ares"])
async def test_an_instance_that_joins_without_what_a_request_needs_never_gets_it(
    preset: str, model_folder: Path
) -> None:
    async with instances("prefill", "decode", "decode", "decode", vocabulary=VOCABULARY, carries=("seed",)) as fakes:
        _, home, lacking, fit = fakes
        gateway = await started(Gateway(configuration(fakes, preset=preset), model_folder, IMPATIENT))
        try:
            home.hold_at = fit.hold_at = 50
            client = Client(gateway, needs=frozenset({"seed"}))
            sequence = await client.reached(10)
            assert sequence.instance is find(gateway, home.name)
            assert view(gateway).cluster.movable.all()
            await lacking.die()
            lacking.carries = ()
            await lacking.start()
            joined = find(gateway, lacking.name)
            await eventually(lambda: joined.open and joined.state.hello is not None and not joined.state.hello.carries)
            with pytest.raises(TargetError, match="decode-1 does not restore seed") as refusal:
                await gateway.migrate(sequence, joined, "test", COMMANDED)
            assert refusal.value.status == 409
            gateway.check_target(sequence, find(gateway, fit.name))
            assert not view(gateway).cluster.movable.any()
            # Nor does it go there when it has to leave.
            await home.die()
            await eventually(lambda: sequence.instance is find(gateway, fit.name))
            fit.hold_at = None
            await client.finish()
            client.check()
            assert lacking.asked == []
        finally:
            await gateway.stop()


async def test_a_restart_under_running_sequences(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    clients = [Client(gateway, 300, name=f"r{n}") for n in range(4)]
    for client in clients:
        await client.reached(10)
    await fakes[1].die()
    await fakes[1].start()
    await finish(clients, 300)
    await eventually(lambda: find(gateway, "decode-0").health.healthy)


async def test_an_instance_that_appears_later(model_folder: Path) -> None:
    first = await FakeInstance("first", "both", vocabulary=VOCABULARY).start()
    late = FakeInstance("late", "both", vocabulary=VOCABULARY)
    gateway = Gateway(configuration([first, late]), model_folder, IMPATIENT)
    await gateway.start()
    await eventually(lambda: gateway.pool.ready)
    assert [i.name for i in gateway.pool.instances] == ["first", late.url]
    await late.start()
    await eventually(lambda: gateway.pool.find("late") is not None and find(gateway, "late").open)
    await gateway.stop()
    await first.die()
    await late.die()


async def test_nobody_there(model_folder: Path) -> None:
    gateway = Gateway(configuration([FakeInstance("absent", "both")]), model_folder, IMPATIENT)
    await gateway.start()
    assert gateway.pool.ready is False
    assert gateway.maximum_model_tokens is None
    await gateway.stop()


async def test_a_gateway_that_stood_still_gives_nobody_up(fakes: list[FakeInstance], model_folder: Path) -> None:
    """As after SIGSTOP: it has not listened, and what was sent meanwhile it has yet to read."""
    tuning = replace(IMPATIENT, frozen_s=0.3, alive_s=0.3, supervision_s=0.05)
    gateway = await started(Gateway(configuration(fakes), model_folder, tuning))
    hold(fakes, 30)
    client = Client(gateway, 200)
    sequence = await client.reached(20)
    running = sequence.key
    time.sleep(1.0)  # noqa: ASYNC251 - this is what the test is about
    await asyncio.sleep(0.2)
    stop_holding(fakes)
    await client.reached(100)
    assert sequence.key == running
    await client.finish()
    client.check(200)
    await gateway.stop()


async def test_instances_that_call_themselves_the_same_are_told_apart(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    for fake in fakes[1:]:
        fake.name = "decode-8100"
    fakes[1].faults.refuse = 503
    made = await started(Gateway(configuration(fakes), model_folder))
    names = {i.name for i in made.pool.decode_instances}
    assert names == {f"decode-8100@{fake.url.removeprefix('http://')}" for fake in fakes[1:]}
    clients = [Client(made, name=f"r{n}") for n in range(6)]
    await finish(clients)
    await made.stop()
