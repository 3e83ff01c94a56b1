"""Role policies: one more instance goes to the role under the larger pressure, not too soon, and never the last one."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ares.policy import Cluster, DecisionError
from ares.policy.roles import (
    PressureSettings,
    RoleChange,
    RolePlan,
    RolePool,
    Roles,
    decode_load,
    mean_step,
    objective_s,
    plan_roles,
    role_policy,
)

AT_ONCE = PressureSettings(smoothing_s=0.0, patience_s=0.0, cooldown_s=0.0, queue_share=0.25, margin=0.1)


def pool(prefill: list[float], decode: list[float], **changes: Any) -> RolePool:
    """Return instances: shares of time in which each prefills, shares of the KV that each decode instance needs."""
    count = len(prefill) + len(decode)
    none = np.zeros(count)
    made = RolePool(
        instances=tuple([f"p{n}" for n in range(len(prefill))] + [f"d{n}" for n in range(len(decode))]),
        decodes=np.arange(count) >= len(prefill),
        able=np.ones(count, dtype=np.bool_),
        changing=False,
        elapsed_s=2.0,
        busy=np.array([*prefill, *([0.0] * len(decode))]),
        queued_s=none,
        requests=none,
        tokens=np.array([*([0.0] * len(prefill)), *(1000.0 * share for share in decode)]),
        capacity_tokens=np.full(count, 1000.0),
        waiting_tokens=0.0,
        step_s=(0.0, 0.0, 0.0),
        ttft_s=10.0,
        tpot_s=0.1,
    )
    return replace(made, **changes)


def planned(seen: RolePool, settings: PressureSettings = AT_ONCE) -> RolePlan:
    return plan_roles(role_policy("pressure", settings), seen)


def test_the_role_under_more_pressure_gets_the_instance_with_the_least_to_move() -> None:
    plan = planned(pool([1.0, 1.0], [0.3, 0.1, 0.2]))
    assert plan.change == RoleChange(3, "prefill")
    assert plan.prefill == pytest.approx(2 / 0.85)
    assert plan.decode == pytest.approx(0.6 / 0.9)
    assert "prefill has load for 2.35 of 2 instances, decode for 0.67 of 3" in plan.reason
    assert "falls from 1.18 to 0.78" in plan.reason
    queued = np.array([3.0, 1.0, 0.0, 0.0])
    assert planned(pool([0.3, 0.2], [1.0, 0.9], queued_s=queued * 0.1)).change == RoleChange(1, "decode")


def test_queued_prompts_count_by_the_objective_of_the_first_token() -> None:
    seen = pool([0.5, 0.5], [0.5, 0.5, 0.5], queued_s=np.array([5.0, 0.0, 0.0, 0.0, 0.0]))
    assert planned(seen).change == RoleChange(2, "prefill")
    assert planned(replace(seen, ttft_s=100.0)).change is None


def test_steps_count_by_the_objective_of_the_time_per_token() -> None:
    """Memory would do, but the steps are too long."""
    seen = pool([0.1, 0.1], [0.4, 0.4], requests=np.array([0.0, 0.0, 10.0, 10.0]), step_s=(0.02, 0.004, 1e-4))
    plan = planned(seen)
    assert plan.decode == pytest.approx((20 * 0.004 + 800 * 1e-4) / 0.08)
    assert plan.change is not None
    assert plan.change.to == "decode"
    # One that no number of instances meets asks for none.
    assert planned(replace(seen, tpot_s=0.02)).decode == pytest.approx(0.8 / 0.9)


def test_requests_that_wait_for_memory_are_load() -> None:
    assert planned(pool([0.1, 0.1], [0.5, 0.5])).change is None
    plan = planned(pool([0.1, 0.1], [0.5, 0.5], waiting_tokens=900.0))
    assert plan.change is not None
    assert plan.change.to == "decode"


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (pool([0.5], [0.1, 0.1]), "both are low"),
        (pool([1.0, 1.0], [1.0, 1.0]), "no other ratio is better"),
        (pool([1.0, 1.0], [0.1]), "has one instance only"),
        (pool([0.1], [1.0, 1.0]), "has one instance only"),
        (pool([1.0], [0.1]), "no instance to spare"),
        (pool([], [1.0, 1.0, 1.0]), "no instance to spare"),
        (pool([], []), "no instance to spare"),
        (pool([1.0, 1.0], [0.1, 0.1], able=np.array([True, True, False, False])), "no instance can change"),
    ],
)
def test_nothing_changes_without_need(seen: RolePool, why: str) -> None:
    plan = planned(seen)
    assert plan.change is None
    assert why in plan.reason


def test_where_nothing_decodes_any_more_one_is_taken_at_once() -> None:
    plan = planned(pool([1.0, 1.0, 0.2], []), PressureSettings())
    assert plan.change is not None
    assert (plan.change.to, plan.reason) == ("decode", "no instance decodes")


def test_instances_that_do_both_decode_as_well() -> None:
    plan = planned(pool([0.1, 0.1], [], others_decode=True))
    assert (plan.change, plan.reason) == (None, "there is no instance to spare")


def test_a_change_that_was_not_made_is_no_reason_to_wait() -> None:
    settings = replace(AT_ONCE, patience_s=3.0, cooldown_s=30.0)
    policy = role_policy("pressure", settings)
    seen = pool([1.0, 1.0], [0.3, 0.1, 0.2])
    plans = [plan_roles(policy, seen) for _ in range(3)]
    assert [plan.change is not None for plan in plans] == [False, False, True]
    policy.change_not_made()
    assert plan_roles(policy, seen).change is not None
    assert plan_roles(policy, seen).change is None


def test_a_change_needs_patience_and_is_followed_by_a_pause() -> None:
    policy = role_policy("pressure", PressureSettings(smoothing_s=0.0, patience_s=10.0, cooldown_s=30.0))
    busy, idle = pool([1.0, 1.0], [0.1, 0.1, 0.1]), pool([0.1, 0.1], [0.1, 0.1, 0.1])

    def until_changed(limit: int = 40) -> int:
        for count in range(limit):
            plan = plan_roles(policy, busy)
            assert plan.towards == "prefill"
            if plan.change is not None:
                return count
        raise AssertionError("never")

    plan_roles(policy, busy)
    assert "not for long yet" in plan_roles(policy, busy).reason
    plan_roles(policy, idle)  # a moment without need, and it begins anew
    assert until_changed() == 5
    plan_roles(policy, replace(busy, changing=True))
    for _ in range(10):
        plan = plan_roles(policy, busy)
        assert plan.change is None
    assert "just changed" in plan.reason
    assert until_changed() == 4


def test_short_bursts_are_smoothed() -> None:
    policy = role_policy("pressure", PressureSettings(smoothing_s=60.0, patience_s=0.0, cooldown_s=0.0))
    plan_roles(policy, pool([0.1, 0.1], [0.3, 0.3, 0.3]))
    for _ in range(5):
        assert plan_roles(policy, pool([1.0, 1.0], [0.3, 0.3, 0.3])).change is None


def test_it_repeats_a_plan_from_its_memory() -> None:
    first, second = role_policy("pressure"), role_policy("pressure")
    for _ in range(5):
        plan_roles(first, pool([1.0, 1.0], [0.1, 0.1, 0.1]))
    second.remember(first.memory())
    seen = pool([0.9, 0.8], [0.1, 0.2, 0.1])
    assert plan_roles(first, seen) == plan_roles(second, seen)


@pytest.mark.parametrize("wrong", [{"queue_share": 0.0}, {"busy_share": 1.5}, {"cooldown_s": -1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PressureSettings(**wrong)


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        (RolePlan(1.0, 1.0, "prefill", "why", RoleChange(7, "prefill")), "unknown_instance"),
        (RolePlan(1.0, 1.0, "prefill", "why", RoleChange(0, "prefill")), "unable_instance"),
        (RolePlan(1.0, 1.0, "decode", "why", RoleChange(0, "decode")), "last_instance"),
        (RolePlan(float("nan"), 1.0, None, "why"), "not_finite"),
        (None, "raised"),
    ],
)
def test_plans_that_cannot_be_are_refused(plan: RolePlan | None, kind: str) -> None:
    class Fixed(Roles):
        name = "fixed"

        def plan(self, pool: RolePool) -> RolePlan:
            if plan is None:
                raise ZeroDivisionError
            return plan

    with pytest.raises(DecisionError) as caught:
        plan_roles(Fixed(), pool([1.0], [0.1, 0.1]))
    assert caught.value.kind == kind


def test_the_load_of_decode_is_the_forecast_of_its_peak() -> None:
    seen = Cluster(
        instances=("a", "b"),
        capacity_tokens=np.array([1000, 1000]),
        promised_tokens=np.array([0, 50]),
        open=np.ones(2, dtype=np.bool_),
        requests=("r0", "r1"),
        location=np.array([0, 0]),
        resident_tokens=np.array([100, 200]),
        movable=np.ones(2, dtype=np.bool_),
        remaining_tokens=np.array([[100.0], [10.0]]),
        levels=(0.5,),
        step_base_s=np.array([0.01, 0.03]),
        step_request_s=np.array([0.0, 0.0]),
        step_token_s=np.array([1e-5, 3e-5]),
    )
    requests, tokens = decode_load(seen)
    assert requests.tolist() == [2.0, 0.0]
    # The short one ends first; then the long one grows alone.
    assert 300 < tokens[0] < 330
    assert tokens[1] == 50.0
    assert decode_load(replace(seen, remaining_tokens=None))[1].tolist() == [300.0, 50.0]
    step_s = mean_step(seen)
    assert step_s == pytest.approx((0.02, 0.0, 2e-5))
    assert mean_step(replace(seen, step_base_s=None)) == (0.0, 0.0, 0.0)
    assert objective_s(0.5, step_s, 1000) == 0.5
    assert objective_s(None, step_s, 1000) == pytest.approx(0.06)
    assert objective_s(None, (0.0, 0.0, 0.0), 1000) == float("inf")


def test_an_objective_near_an_empty_step_asks_for_no_end_of_instances() -> None:
    """The load follows the objective without jumps, and no gain is worth hundreds of instances."""

    def load(tpot_s: float) -> float:
        seen = pool([0.5], [0.1], step_s=(0.02, 1e-4, 1e-7), requests=np.array([0.0, 20.0]), tpot_s=tpot_s)
        return planned(seen).decode

    work_s = 20 * 1e-4 + 100 * 1e-7
    assert load(0.03) == pytest.approx(work_s / 0.01)
    by_objective = [load(0.015 + 1e-5 * step) for step in range(1500)]
    assert max(by_objective) < 1.1 * work_s / 0.002
    assert max(abs(a - b) for a, b in itertools.pairwise(by_objective)) < 0.02
    assert by_objective[0] == pytest.approx(0.1 / 0.9), "out of reach: the memory alone"
