"""Decode instances that run out of memory: requests move or resume elsewhere before, or after."""

from pathlib import Path

import numpy as np

from ares.gateway.service import Gateway
from ares.policy import forecast
from tests.gateway.gateways import (
    Client,
    cluster,
    finish,
    hold,
    sample,
    stop_holding,
)
from tests.waiting import eventually


async def test_before_memory_ends_a_request_is_moved(model_folder: Path) -> None:
    async with cluster(model_folder, preset="off") as (gateway, fakes):
        crowded = next(i for i in gateway.pool.decode_instances)
        spare = next(i for i in gateway.pool.decode_instances if i is not crowded)
        spare.state.draining = True
        hold(fakes, 290)
        clients = [Client(gateway, 400, name=f"r{n}", prompt=[10 + n] * 50) for n in range(2)]
        await eventually(lambda: all(len(client.tokens) == 240 for client in clients), 20)
        spare.state.draining = False
        gateway.controller.use_preset("ares")
        await eventually(lambda: sample(gateway, "ares_oom_actions_total", how="moved") >= 1)
        stop_holding(fakes)
        await finish(clients, 400)
        assert any(record.reason.startswith("out-of-memory avoidance: ") for record in gateway.migrations)


async def test_what_is_preempted_runs_again_where_there_is_room(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        hold(fakes, 60)
        client = Client(gateway, 200, name="r0", prompt=[3] * 30)
        await eventually(lambda: len(client.tokens) == 30, 20)
        full = next(fake for fake in fakes[1:] if fake.running)
        full.preempted |= set(full.running)
        stop_holding(fakes)
        await client.finish()
        client.check(200)
        assert gateway.controller.suspensions == 1
        assert not gateway.migrations


async def test_a_static_preset_leaves_the_preempted_to_the_engine(model_folder: Path) -> None:
    async with cluster(model_folder, preset="ares-no-prediction") as (gateway, fakes):
        hold(fakes, 60)
        client = Client(gateway, 200, name="r0", prompt=[3] * 30)
        await eventually(lambda: len(client.tokens) == 30, 20)
        full = next(fake for fake in fakes[1:] if fake.running)
        full.preempted |= set(full.running)
        await eventually(lambda: bool(gateway.controller.snapshots.build(gateway.sessions.values()).preempted))
        view = gateway.controller.snapshots.build(gateway.sessions.values())
        assert view.cluster.resident_tokens.tolist() == [view.sessions[0].tokens]  # it takes them before all others
        full.preempted.clear()
        stop_holding(fakes)
        await client.finish()
        client.check(200)
        assert gateway.controller.suspensions == 0


async def test_memory_is_forecast_in_blocks(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        hold(fakes, 47)
        client = Client(gateway, 200, name="r0", prompt=[3] * 30)
        await eventually(lambda: len(client.tokens) == 17, 20)
        # 47 tokens fill three blocks of 16, but for the next token; 48 would hold a fourth.
        await eventually(lambda: held_now(gateway) == 48)
        hold(fakes, 48)
        await eventually(lambda: held_now(gateway) == 64)
        stop_holding(fakes)
        await client.finish()


def held_now(gateway: Gateway) -> float:
    cluster = gateway.controller.snapshots.build(gateway.sessions.values()).cluster
    return float(forecast(cluster, np.zeros(1, np.int64)).allocated.sum())
