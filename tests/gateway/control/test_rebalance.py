"""Rebalancing in a gateway: a policy that evens out the load, one that fails, and none."""

import json
from pathlib import Path

import pytest

from ares.gateway.records.replay import replay
from ares.gateway.service import COMMANDED, Gateway
from ares.policy import Cluster, MigrationDecision
from tests.gateway.fakes import FakeInstance
from tests.gateway.gateways import (
    Client,
    cluster,
    configuration,
    find,
    finish,
    hold,
    sample,
    started,
    stop_holding,
)
from tests.waiting import eventually


async def test_a_controller_that_throws_does_not_stop_serving(fakes: list[FakeInstance], model_folder: Path) -> None:
    gateway = Gateway(configuration(fakes, preset="ares-no-prediction", period_s=0.01), model_folder)

    def broken(cluster: Cluster) -> list[MigrationDecision]:
        raise RuntimeError("a bug in the policy")

    await started(gateway)
    gateway.controller.rebalancing.decider.policy.decide = broken
    client = Client(gateway)
    await client.finish()
    client.check()
    await eventually(lambda: sample(gateway, "ares_rebalance_decisions_total", result="failed") >= 2)
    await gateway.stop()


async def test_a_policy_that_orders_nonsense_costs_nothing(fakes: list[FakeInstance], model_folder: Path) -> None:
    """It orders every request to where it is, to a prefill role and to an instance that refuses."""
    gateway = Gateway(configuration(fakes, preset="ares-no-prediction", period_s=0.02), model_folder)
    fakes[2].faults.refuse = 503
    turn = 0

    def insists(cluster: Cluster) -> list[MigrationDecision]:
        nonlocal turn
        turn += 1
        return [
            MigrationDecision(request=n, source=int(at), target=turn % 3, gain=1.0, reason="x")
            for n, at in enumerate(cluster.location)
        ]

    await started(gateway)
    gateway.controller.rebalancing.decider.policy.decide = insists
    clients = [Client(gateway, 300, name=f"r{n}") for n in range(2)]
    await finish(clients, 300)
    assert turn > 5
    await gateway.stop()


async def test_the_policy_evens_out_the_load(fakes: list[FakeInstance], model_folder: Path) -> None:
    settings = {"preset": "ares-no-prediction", "period_s": 0.05, "cooldown_s": 60}
    gateway = await started(Gateway(configuration(fakes, **settings), model_folder))
    find(gateway, "decode-1").state.draining = True
    clients = [Client(gateway, 500, name=f"r{n}", prompt=[9 + n] * 50) for n in range(4)]
    for client in clients:
        await client.reached(5)
    find(gateway, "decode-1").state.draining = False
    await eventually(lambda: sum(record.outcome == "moved" for record in gateway.migrations) >= 2)
    await finish(clients, 500)
    # Its cooldown keeps a request that has moved from moving again.
    moved = [record.request_id for record in gateway.migrations if record.outcome == "moved"]
    assert len(moved) == len(set(moved))
    assert all(record.reason.startswith("ares-no-prediction: ") for record in gateway.migrations)
    assert sample(gateway, "ares_rebalance_decisions_total", result="moved") >= 1
    await gateway.stop()


async def test_the_off_preset_never_decides(gateway: Gateway) -> None:
    client = Client(gateway)
    await client.finish()
    assert sample(gateway, "ares_rebalance_decisions_total", result="kept") == 0
    assert len(gateway.migrations) == 0


@pytest.mark.parametrize("rest_s", [60.0, 0.0])
async def test_a_commanded_move_is_not_undone_for_a_while(model_folder: Path, tmp_path: Path, rest_s: float) -> None:
    settings = {"preset": "off", "cooldown_s": 0.0, "commanded_cooldown_s": rest_s, "decision_log": tmp_path / "log"}
    async with cluster(model_folder, kv_blocks=1000, **settings) as (gateway, fakes):
        hold(fakes, 230)
        ours = Client(gateway, 400, name="ours", prompt=[10] * 200)
        await eventually(lambda: len(ours.tokens) == 30, 30)
        # The other one stays where it is: only ours could even the load out.
        theirs = Client(gateway, 400, name="theirs", prompt=[11] * 200, unmovable_reason="test")
        await eventually(lambda: len(theirs.tokens) == 30, 30)
        sequence = gateway.sessions["ours"]
        target = gateway.sessions["theirs"].instance
        assert sequence.instance is not target
        hold(fakes, 260)
        assert (await gateway.migrate(sequence, target, COMMANDED, COMMANDED)).outcome == "moved"
        await eventually(lambda: len(ours.tokens) == 60, 30)
        gateway.controller.use_preset("ares-no-prediction")
        periods = sum_of(gateway, "kept", "moved")
        await eventually(lambda: sum_of(gateway, "kept", "moved") >= periods + 10, 30)
        view = gateway.controller.snapshots.build(gateway.sessions.values())
        if rest_s:
            assert sequence.instance is target
            assert view.cluster.commanded.tolist() == [name == "ours" for name in view.cluster.requests]
        else:
            await eventually(lambda: len(gateway.migrations) > 1, 30)
            assert view.cluster.commanded is None
        assert not view.cluster.movable.any() or not rest_s
        stop_holding(fakes)
        await finish([ours, theirs], 400)
    result = replay(tmp_path / "log", None)
    assert result.decisions == result.same > 0
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert any(one["cluster"]["commanded"] for one in records if "cluster" in one) == bool(rest_s)
    old = tmp_path / "old"
    old.write_text((tmp_path / "log").read_text().replace('"commanded":', '"placed":'))
    assert replay(old, None).same == result.same


def sum_of(gateway: Gateway, *results: str) -> float:
    return sum(sample(gateway, "ares_rebalance_decisions_total", result=result) for result in results)
