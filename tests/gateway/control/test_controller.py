"""Dispatch that fails, and predictions and telemetry that are wrong or missing: they cost no request."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.gateways import (
    Client,
    cluster,
    finish,
    hold,
    sample,
    stop_holding,
)
from tests.gateway.running import IMPATIENT
from tests.waiting import eventually


async def test_a_dispatch_that_throws_costs_no_request(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):

        def broken(*_: Any) -> Any:
            raise RuntimeError("a bug in the policy")

        # The door that is opened when the entrance fails is dispatch too.
        gateway.controller.admission_decider.policy.decide = broken  # type: ignore[method-assign]
        gateway.controller.dispatch_decider.policy.choose = broken  # type: ignore[method-assign]
        hold(fakes, 30)
        clients = [Client(gateway, 100, name=f"r{n}", prompt=[10 + n] * 20) for n in range(4)]
        for client in clients:
            await client.reached(5)
        assert [len(fake.running) for fake in fakes[1:]] == [2, 2]
        stop_holding(fakes)
        await finish(clients, 100)
        assert sample(gateway, "ares_controller_faults_total", part="dispatch") >= 4


@pytest.mark.parametrize("nonsense", [(math.nan,) * 3, (-5.0, 1.0, 2.0), (9.0, 3.0, 1.0), (1.0, math.inf, math.inf)])
async def test_predictions_that_make_no_sense_are_counted_and_not_used(
    model_folder: Path, nonsense: tuple[float, float, float]
) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        for fake in fakes[1:]:
            fake.predicts = lambda _: nonsense
        clients = [Client(gateway, 200, name=f"r{n}", prompt=[10 + n] * 20) for n in range(4)]
        await finish(clients, 200)
        assert sample(gateway, "ares_implausible_predictions_total") > 0
        assert sample(gateway, "ares_controller_faults_total", part="rebalance") == 0


async def test_huge_predictions_end_at_the_limit(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        for fake in fakes[1:]:
            fake.predicts = lambda _: (1e300, 1e300, 1e300)
            fake.hold_at = 30
        client = Client(gateway, 100, prompt=[5] * 20)
        sequence = await client.reached(10)
        await eventually(lambda: sequence.predicted is not None or bool(gateway.pool))
        seen = gateway.controller.snapshots.build(gateway.sessions.values()).cluster.remaining_tokens
        assert seen is not None
        assert (seen <= 100).all()
        stop_holding(fakes)
        await client.finish()
        client.check(100)


async def test_serving_goes_on_without_telemetry(model_folder: Path) -> None:
    async with cluster(model_folder, tuning=IMPATIENT) as (gateway, fakes):
        for fake in fakes:
            fake.engine.faults.change(b'{"telemetry": "silent"}')
        await eventually(lambda: not any(i.health.healthy for i in gateway.pool.instances), 20)
        await eventually(lambda: any(i.health.reachable for i in gateway.pool.decode_instances), 20)
        client = Client(gateway)
        await client.finish()
        client.check()
