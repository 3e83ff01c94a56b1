"""The planner of roles over fake instances: what it sees, says and does."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ares.cli import operator_tables
from ares.config import ConfigError, load
from ares.gateway.records.replay import replay
from ares.gateway.service import Gateway
from ares.gateway.tuning import DEFAULT
from ares.policy import DecisionError
from ares.policy.roles import Pressure, RoleChange, RolePlan, RolePool
from tests import waiting
from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.gateways import Client, configuration, exactly, finish, sample, started
from tests.gateway.running import VOCABULARY

pytestmark = pytest.mark.timeout(240)
eventually = functools.partial(waiting.eventually, timeout_s=60.0)
AT_ONCE = {"smoothing_s": 0.0, "patience_s": 0.0, "cooldown_s": 0.0}


@contextlib.asynccontextmanager
async def planning(
    folder: Path, mode: str, log: Path | None = None
) -> AsyncIterator[tuple[Gateway, list[FakeInstance], list[Client]]]:
    """Two prefill instances, and one decode instance with requests for nearly all of its memory."""
    async with instances("prefill", "prefill", "decode", vocabulary=VOCABULARY) as fakes:
        for fake in fakes:
            fake.kv_blocks, fake.predicts = 40, exactly
            await fake.die()
            await fake.start()
        settings: Any = {"role_planner": mode, "role_planner_settings": AT_ONCE if mode != "off" else {}}
        made = Gateway(configuration(fakes, decision_log=log, **settings), folder, replace(DEFAULT, role_period_s=0.05))
        gateway = await started(made)
        fakes[2].hold_at = 35
        clients = [Client(gateway, name=f"r{n}") for n in range(9)]
        await eventually(lambda: all(len(c.tokens) == 30 for c in clients))
        yield gateway, fakes, clients
        for fake in fakes:
            fake.hold_at = None
        await finish(clients)
        for fake in fakes:
            await fake.until(lambda fake=fake: fake.quiet)
        await gateway.stop()


def roles(gateway: Gateway) -> list[str]:
    return sorted(i.role for i in gateway.pool.instances)


async def test_it_changes_a_role_where_it_acts(model_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    async with planning(model_folder, "act", log) as (gateway, _, _clients):
        await eventually(lambda: roles(gateway) == ["decode", "decode", "prefill"])
        changes = [change for change in gateway.pool.changes.since(0) if change.state == "planned decode"]
        assert len(changes) == 1
        assert "decode for" in changes[0].why
        assert sample(gateway, "ares_role_changes_total", trigger="planned", role="decode") == 1
        # And leaves it at that.
        await eventually(lambda: "no other ratio" in str(gateway.role_planner.status["reason"])
                         or "low" in str(gateway.role_planner.status["reason"])
                         or "one instance only" in str(gateway.role_planner.status["reason"]))  # fmt: skip
        assert roles(gateway) == ["decode", "decode", "prefill"]
    # Its plans are made again from the log, the first one too, and under any preset.
    for again in (replay(log, None), replay(log, "static-rr")):
        assert not [one for one in again.differences if "become_" in str(one)]
        assert again.made["become_decode"] == again.logged["become_decode"] == 1
        assert again.made["become_prefill"] == 0


async def test_it_says_once_what_it_would_change_where_it_advises(model_folder: Path) -> None:
    async with planning(model_folder, "advise") as (gateway, fakes, clients):
        await eventually(lambda: gateway.role_planner.status["advice"] is not None)
        status = gateway.role_planner.status
        assert status["planner"] == "advise"
        assert status["advice"]["role"] == "decode"
        assert status["advice"]["instance"].startswith("prefill-")
        assert status["decode_load"] > 0.7
        assert sample(gateway, "ares_role_load_instances", role="decode") > 0.7
        assert sample(gateway, "ares_desired_instances", role="prefill") == 1
        for _ in range(3):
            await gateway.role_planner.plan()
        assert len([c for c in gateway.pool.changes.since(0) if c.state == "advice decode"]) == 1
        assert roles(gateway) == ["decode", "prefill", "prefill"]
        # Advice that holds no more is taken back.
        fakes[2].hold_at = None
        await finish(clients)
        await eventually(lambda: gateway.role_planner.status["advice"] is None)


async def test_a_fault_costs_a_plan_and_not_the_service(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Pressure, "plan", fails)
    async with planning(model_folder, "act") as (gateway, _, _clients):
        await eventually(lambda: sample(gateway, "ares_controller_faults_total", part="roles") > 0)
        with pytest.raises(DecisionError):
            await gateway.role_planner.plan()


async def test_it_is_off_by_default(model_folder: Path) -> None:
    async with planning(model_folder, "off") as (gateway, _, _clients):
        assert gateway.role_planner.status == {
            "planner": "off", "prefill_load": None, "decode_load": None, "advice": None, "reason": None,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"role_planner": "perhaps"}, "role_planner"),
        ({"role_planner": "act", "role_planner_settings": {"patience": 3}}, "unknown setting 'patience'"),
        ({"role_planner": "act", "role_planner_settings": {"margin": -1}}, "margin must be from 0"),
        ({"role_planner_settings": {"margin": 1}}, "no effect while role_planner is off"),
    ],
)
def test_wrong_settings_are_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load(model="some/model", workers=["http://127.0.0.1:1"], **given)


@pytest.mark.parametrize("several", [False, True])
def test_status_says_what_it_plans(several: bool) -> None:
    plan = {"planner": "advise", "reason": "decode is full", "advice": {"instance": "prefill-1", "role": "decode"}}
    off = {"planner": "off", "reason": None, "advice": None}
    read = {"models": [{"name": "a", "roles": plan}, {"name": "b", "roles": off}]} if several else {"roles": plan}
    console = Console(width=200, record=True)
    operator_tables.roles(read, console)
    operator_tables.roles({"roles": off}, console)
    operator_tables.roles({}, console)
    of = " of a" if several else ""
    assert console.export_text() == f"roles{of} (advise): decode is full; prefill-1 should become decode\n"


async def test_of_two_gateways_that_plan_at_the_same_time_one_acts(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked before either has changed a role: the second plan is about a pool that is no more."""
    async with instances("prefill", "prefill", "prefill", "decode", vocabulary=VOCABULARY) as fakes:
        tuning = replace(DEFAULT, role_period_s=1e6, closing_lease_s=30.0)
        config = configuration(fakes, role_planner="act")
        gateways = [await started(Gateway(config, model_folder, tuning)) for _ in range(2)]

        def plan(_: Pressure, pool: RolePool) -> RolePlan:
            prefills = [n for n, decodes in enumerate(pool.decodes) if not decodes]
            return RolePlan(1.0, 2.0, "decode", "test", RoleChange(prefills[calls.pop()], "decode"))

        calls = [0, 1]
        monkeypatch.setattr(Pressure, "plan", plan)
        try:
            await asyncio.gather(*(gateway.role_planner.plan() for gateway in gateways))
            ordered = [sample(g, "ares_role_changes_total", trigger="planned", role="decode") for g in gateways]
            assert sorted(ordered) == [0, 1]
            for gateway in gateways:
                await eventually(lambda gateway=gateway: roles(gateway) == ["decode", "decode", "prefill", "prefill"])
        finally:
            for gateway in gateways:
                await gateway.stop()
