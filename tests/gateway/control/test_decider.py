"""A rebalance policy that fails, orders nonsense or takes too long costs its moves and nothing else."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ares.gateway.control.decider import Decider
from ares.gateway.records.replay import replay
from ares.policy import Cluster, DecisionError, MigrationDecision, Rebalance, decide_moves
from tests.gateway.gateways import Client, cluster, hold, sample, stop_holding
from tests.waiting import eventually

VIEW: Any = None


class Waits(Rebalance):
    name = "waits"

    def __init__(self) -> None:
        self.asked, self.go = 0, threading.Event()

    def decide(self, cluster: Cluster) -> list[MigrationDecision]:
        self.asked += 1
        self.go.wait(20)
        return []


async def test_a_policy_that_takes_too_long_is_asked_again_only_when_it_has_answered() -> None:
    policy = Waits()
    decider = Decider(policy, decide_moves)
    begun = time.monotonic()
    with pytest.raises(DecisionError, match=r"'waits' took longer than 0\.05 s"):
        await decider.decide(VIEW, timeout_s=0.05)
    with pytest.raises(DecisionError, match="has not answered yet") as caught:
        await decider.decide(VIEW, timeout_s=20)
    assert time.monotonic() - begun < 10
    assert caught.value.kind == "late"
    assert policy.asked == 1
    policy.go.set()

    async def until_it_answers() -> list[MigrationDecision]:
        while True:
            try:
                return await decider.decide(VIEW, timeout_s=20)
            except DecisionError:
                await asyncio.sleep(0.002)

    assert await asyncio.wait_for(until_it_answers(), 20) == []
    assert policy.asked == 2


class Answers(Rebalance):
    name = "answers"

    def decide(self, cluster: Cluster) -> list[MigrationDecision]:
        return []


async def test_one_question_after_the_other_is_answered() -> None:
    """A thread that has answered may not have ended yet: that is not late."""
    decider = Decider(Answers(), decide_moves)
    for _ in range(200):
        assert await decider.decide(VIEW, timeout_s=20) == []


def test_each_kind_of_fault_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    decider = Decider(Waits(), decide_moves)
    with caplog.at_level(logging.ERROR):
        for kind in ("gain", "late", "gain", "gain"):
            decider.record_fault(DecisionError("waits", kind, f"is wrong: {kind}"))
    assert [record.message.split(";")[0][-4:] for record in caplog.records] == ["gain", "late"]
    assert decider.faults == {"gain": 3, "late": 1}


def twice(view: Cluster) -> list[MigrationDecision]:
    row = int(view.movable.argmax())
    source = int(view.location[row])
    return [MigrationDecision(row, source, 1 - source, 1.0, "x")] * 2


def nothing(view: Cluster) -> Any:
    return None


def stays(view: Cluster) -> list[MigrationDecision]:
    move = twice(view)[0]
    return [replace(move, target=move.source)]


@pytest.mark.parametrize(("orders", "kind"), [(twice, "repeated"), (nothing, "not_moves"), (stays, "same_instance")])
async def test_nonsense_is_counted_and_serving_goes_on(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, orders: Callable[[Cluster], Any], kind: str
) -> None:
    async with cluster(model_folder, preset="ares-no-prediction", decision_log=tmp_path / "log") as (gateway, fakes):
        hold(fakes, 40)
        client = Client(gateway, 100)
        await client.reached(5)
        gateway.controller.rebalancing.decider.policy.decide = orders
        await eventually(lambda: gateway.controller.rebalancing.decider.faults[kind] >= 3)
        stop_holding(fakes)
        await client.finish()
        client.check(100)
        assert sample(gateway, "ares_controller_faults_total", part="rebalance") >= 3
        assert sample(gateway, "ares_rebalance_decisions_total", result="failed") >= 3
        assert len(gateway.migrations) == 0
    again = replay(tmp_path / "log", None)
    assert again.decisions == again.same >= 3
    assert sum("rebalance policy 'current_load'" in record.message for record in caplog.records) == 1
