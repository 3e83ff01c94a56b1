"""Several gateways before one pool of fake instances: whose turn it is, what each sees, what a dead one leaves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ares.gateway.records.replay import replay
from ares.gateway.service import Gateway
from ares.gateway.tuning import DEFAULT, Tuning
from ares.protocol import messages
from tests.gateway.fakes import FakeInstance, expected, instances
from tests.gateway.gateways import Client, configuration, find, finish, hold, sample, started, stop_holding, view
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually

PRESET = "ares-no-prediction"


@contextlib.asynccontextmanager
async def gateways(
    fakes: list[FakeInstance], folder: Path, count: int = 2, tuning: Tuning = DEFAULT, **settings: Any
) -> AsyncIterator[Any]:
    """So many gateways that rebalance before the same instances."""
    chosen = {"preset": PRESET, "period_s": 0.05, "handover_timeout_s": 10.0} | settings
    made = [await started(Gateway(configuration(fakes, **chosen), folder, tuning)) for _ in range(count)]
    try:
        yield made
    finally:
        for gateway in made:
            await gateway.stop()


def decided(gateway: Gateway) -> float:
    return sum(sample(gateway, "ares_rebalance_decisions_total", result=result) for result in ("kept", "moved"))


def elsewhere(gateway: Gateway) -> float:
    return sample(gateway, "ares_rebalance_decisions_total", result="elsewhere")


# --- turns ---


async def test_a_gateway_alone_has_every_turn(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with gateways(fakes, model_folder, 1) as (gateway,):
        await eventually(lambda: decided(gateway) >= 10)
        assert elsewhere(gateway) == 0
        assert gateway.controller.lease_status == {"where": "here", "holder": None, "missed_periods": 0}


async def test_each_has_its_turns_and_never_two_at_a_time(
    fakes: list[FakeInstance], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateways(fakes, model_folder, 3) as made:
        holding: list[str] = []
        turns: list[str] = []

        def watch(gateway: Gateway) -> None:
            lease = gateway.controller.lease
            acquire, release = lease.acquire, lease.release

            async def taken(within_s: float) -> bool:
                granted = await acquire(within_s)
                if granted:
                    holding.append(gateway.name)
                    turns.append(gateway.name)
                    assert holding == [gateway.name]
                return granted

            async def given_back(moves: Any = ()) -> None:
                # Others may have it from the moment that the last part is back.
                await asyncio.sleep(0.005)
                if gateway.name in holding:
                    holding.remove(gateway.name)
                await release(moves)

            monkeypatch.setattr(lease, "acquire", taken)
            monkeypatch.setattr(lease, "release", given_back)

        for gateway in made:
            watch(gateway)
        await eventually(lambda: all(turns.count(gateway.name) >= 5 for gateway in made), 40)
        assert all(sample(gateway, "ares_controller_faults_total", part="rebalance") == 0 for gateway in made)


async def test_the_next_turn_comes_when_the_moves_have_ended(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with gateways(fakes, model_folder, preset="off") as (first, second):
        move = asyncio.create_task(asyncio.Event().wait())
        assert await first.controller.lease.acquire(1.0)
        ending = asyncio.create_task(first.controller.lease.release([move]))
        assert not await second.controller.lease.acquire(0.1)
        assert second.controller.lease.holder == first.name
        assert second.controller.lease.missed == 1
        move.cancel()
        assert await second.controller.lease.acquire(5.0)
        assert (second.controller.lease.holder, second.controller.lease.missed) == ("", 0)
        await ending
        await second.controller.lease.release()


async def test_a_turn_that_is_taken_on_is_not_ended_by_the_decision_before(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    async with gateways(fakes, model_folder, preset="off") as (first, second):
        lease = first.controller.lease
        move = asyncio.create_task(asyncio.Event().wait())
        assert await lease.acquire(1.0)
        ending = asyncio.create_task(lease.release([move]))
        await asyncio.sleep(0)
        assert await lease.acquire(1.0)
        move.cancel()
        await ending
        assert not await second.controller.lease.acquire(0.1)
        await lease.release()
        assert await second.controller.lease.acquire(5.0)
        await second.controller.lease.release()


async def test_a_turn_to_close_an_instance_is_not_ended_by_a_decision_of_moves(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    async with gateways(fakes, model_folder, preset="off") as (first, second):
        lease = first.controller.lease
        async with first.closing.turn():
            assert await lease.acquire(1.0)
            await lease.release()
            assert not await second.controller.lease.acquire(0.1)
        assert await second.controller.lease.acquire(5.0)
        await second.controller.lease.release()


async def test_moves_without_end_do_not_keep_others_from_their_turn(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    async with gateways(fakes, model_folder, tuning=Tuning(lease_turn_s=0.2), preset="off") as (first, second):
        move = asyncio.create_task(asyncio.Event().wait())
        assert await first.controller.lease.acquire(1.0)
        await first.controller.lease.release([move])
        assert await second.controller.lease.acquire(5.0)
        await second.controller.lease.release()
        move.cancel()


async def test_one_that_dies_in_its_turn_is_replaced(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with gateways(fakes, model_folder, preset="off") as (dies, stays):
        assert await dies.controller.lease.acquire(1.0)
        assert not await stays.controller.lease.acquire(0.1)
        await dies.pool.stop()  # its connections end; nothing is given back
        assert await stays.controller.lease.acquire(20.0)
        await stays.controller.lease.release()


async def test_one_that_freezes_in_its_turn_is_replaced(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with gateways(fakes, model_folder, tuning=Tuning(lease_ttl_s=0.3), preset="off") as (frozen, stays):
        assert await frozen.controller.lease.acquire(1.0)
        assert await stays.controller.lease.acquire(20.0)
        # And learns of it before it decides again.
        assert not await frozen.controller.lease.acquire(0.1)
        await stays.controller.lease.release()


async def test_parts_that_were_granted_are_given_back_by_who_did_not_get_all(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    async with gateways(fakes, model_folder, preset="off") as (first, second):
        held = await find(first, "decode-0").control.lease(first.name, 5.0, 5.0)
        assert held is not None
        assert held.granted
        assert not await second.controller.lease.acquire(0.0)
        asked = await find(first, "decode-1").control.lease(first.name, 5.0, 5.0)
        assert asked is not None
        assert asked.granted


async def test_half_of_the_instances_are_not_enough_and_more_are(model_folder: Path) -> None:
    async with (
        instances("prefill", "decode", "decode", "decode", vocabulary=VOCABULARY) as fakes,
        gateways(fakes, model_folder, 1, preset="off") as (gateway,),
    ):
        lease = gateway.controller.lease
        silent = [find(gateway, f"decode-{n}") for n in range(2)]

        async def unanswered(*_: Any) -> None:
            return None

        silent[0].control.lease = unanswered
        assert await lease.acquire(0.0)
        silent[1].control.lease = unanswered
        assert not await lease.acquire(0.0)
        assert gateway.controller.lease.holder == ""


async def test_instances_of_an_earlier_version_grant(model_folder: Path) -> None:
    async with instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes:
        for fake in fakes:
            fake.leases = False
            await fake.die()
            await fake.start()
        async with gateways(fakes, model_folder) as made:
            await eventually(lambda: all(decided(gateway) >= 3 for gateway in made))
            assert all(elsewhere(gateway) == 0 for gateway in made)


async def test_a_gateway_that_gets_no_turn_counts_it_and_serves_on(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    async with gateways(fakes, model_folder) as (first, second):
        assert await first.controller.lease.acquire(10.0)
        first.controller.use_preset("off")  # it does not go on
        keeper = asyncio.create_task(_keep(first))
        await eventually(lambda: elsewhere(second) >= 3)
        turns = second.controller.lease_status
        assert (turns["where"], turns["holder"]) == ("elsewhere", first.name)
        assert turns["missed_periods"] >= 1
        client = Client(second, 60)
        await client.finish()
        client.check(60)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        await first.controller.lease.release()
        before = decided(second)
        await eventually(lambda: decided(second) > before and second.controller.lease_status["where"] == "here")
        assert second.controller.lease_status["missed_periods"] == 0


async def _keep(gateway: Gateway) -> None:
    while True:
        await gateway.controller.lease.acquire(1.0)
        await asyncio.sleep(0.02)


# --- what each sees ---


async def test_requests_of_others_are_rows_that_cannot_be_moved(
    fakes: list[FakeInstance], model_folder: Path, tmp_path: Path
) -> None:
    hold(fakes, 40)
    for fake in fakes[1:]:
        fake.predicts = lambda request: (1.0, float(request.end - len(request.output)), 500.0)
    log = tmp_path / "decisions.jsonl"
    settings = {"preset": "ares", "decision_log": log}
    async with (
        gateways(fakes, model_folder, 1, preset="off") as (other,),
        gateways(fakes, model_folder, 1, **settings) as (gateway,),
    ):
        theirs = [Client(other, 200, name=f"theirs-{n}", prompt=[10 + n] * 20) for n in range(2)]
        await eventually(lambda: all(len(client.tokens) == 20 for client in theirs))
        ours = Client(gateway, 100, name="ours", prompt=[50] * 30)
        await eventually(lambda: len(ours.tokens) == 10)
        await eventually(
            lambda: (r := view(gateway).cluster.remaining_tokens) is not None and (r[:, 1] == 180).sum() == 2
        )
        seen = view(gateway)
        cluster = seen.cluster
        assert cluster.requests[0] == "ours"
        assert {messages.owner(str(key)) for key in cluster.requests[1:]} == {other.name}
        assert cluster.movable.tolist() == [True, False, False]
        await eventually(lambda: view(gateway).cluster.resident_tokens.tolist() == [40, 40, 40])
        assert cluster.block_tokens == 16
        assert cluster.promised_tokens.tolist() == [0, 0]
        assert [s.id for s in seen.sessions] == ["ours"]
        for name in (
            "generated",
            "age_s",
            "elapsed_s",
            "ttft_missed",
            "ttft_s",
            "tpot_s",
            "gap_s",
            "longest_gap_s",
            "rank",
        ):
            assert len(getattr(seen.running, name)) == 3
        assert np.isfinite(seen.running.tpot_s).all()
        # At an arrival nobody looks at rows.
        loads = gateway.controller.snapshots.build_loads
        await eventually(
            lambda: loads(gateway.sessions.values()).cluster.load_tokens().sum() == 3 * 48
        )  # whole blocks of 40 tokens and the next
        assert loads(gateway.sessions.values()).cluster.requests == ()
        await eventually(lambda: decided(gateway) >= 2)
        stop_holding(fakes)
        for client, count in ((ours, 100), (theirs[0], 200), (theirs[1], 200)):
            await client.finish()
            client.check(count)
    again = replay(log, None)
    assert again.decisions > 2
    assert again.differences == []


async def test_gateways_even_out_a_pool_together(fakes: list[FakeInstance], model_folder: Path) -> None:
    """Everything begins on one instance, most of it of one gateway; none moves what another has made room for."""
    fakes[1].hold_at = fakes[2].hold_at = 60
    async with gateways(fakes, model_folder, cooldown_s=0.2) as made:
        for gateway in made:
            find(gateway, "decode-1").state.draining = True
        clients = [Client(made[n < 7], 600, name=f"r{n}", prompt=[10 + n] * 30) for n in range(8)]
        await eventually(lambda: all(len(client.tokens) == 30 for client in clients))
        assert (len(fakes[1].running), len(fakes[2].running)) == (8, 0)
        for fake in fakes[1:]:
            fake.step_s, fake.hold_at = 0.01, None
        for gateway in made:
            find(gateway, "decode-1").state.draining = False
        await eventually(lambda: (len(fakes[1].running), len(fakes[2].running)) == (4, 4))
        assert sample(made[1], "ares_migrations_total", trigger=PRESET, outcome="moved") >= 1
        for fake in fakes[1:]:
            fake.step_s = 0.001
        await finish(clients, 600)


# --- the death of one ---


async def test_what_a_dead_gateway_had_pinned_is_let_go_and_nothing_else(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    hold(fakes, 40)
    async with gateways(fakes, model_folder, preset="off") as (dies, stays):
        client = Client(stays, 60, name="stays", prompt=[5] * 10)
        await client.reached(30)
        pins = {}
        for gateway in (dies, stays):
            key = f"{gateway.name}/prefilled/1"
            body = {"token_ids": [7] * 20, "sampling_params": {"max_tokens": 1}}
            params = {"ares_key": key, "do_remote_decode": True}
            await find(gateway, "prefill-0").engine.complete({**body, "kv_transfer_params": params})
            pins[gateway] = key
        assert set(fakes[0].pinned) == set(pins.values())
        await dies.pool.stop()
        await eventually(lambda: fakes[0].orphans == [pins[dies]])
        assert set(fakes[0].pinned) == {pins[stays]}
        await find(stays, "prefill-0").control.release(pins[stays])
        stop_holding(fakes)
        await client.finish()
        client.check(60)
        for fake in fakes:
            await fake.until(lambda fake=fake: fake.quiet)


async def test_kv_that_may_have_been_let_go_is_not_pulled(fakes: list[FakeInstance], model_folder: Path) -> None:
    """A gateway that an instance has forgotten computes again what the instance kept for it."""
    async with gateways(fakes, model_folder, 1, preset="off") as (gateway,):
        prefill = find(gateway, "prefill-0")
        admit = gateway.controller.admit

        async def after_an_interruption(*arguments: Any) -> Any:
            prefill.subscription.begin()  # as when its connection broke meanwhile
            return await admit(*arguments)

        gateway.controller.admit = after_an_interruption
        client = Client(gateway, 60)
        await client.finish()
        client.check(60)
        assert fakes[1].pulled == fakes[2].pulled == []
        await eventually(lambda: len(fakes[0].freed) == 1)
        gateway.controller.admit = admit
        await eventually(lambda: prefill.subscription.unbroken(prefill.subscription.number))
        await eventually(lambda: prefill.open)
        client = Client(gateway, 60)
        await client.finish()
        assert client.tokens == expected(client.prompt, 60, vocabulary=VOCABULARY)
        assert len(fakes[1].pulled + fakes[2].pulled) == 1
