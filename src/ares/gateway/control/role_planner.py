"""The planner of roles: it looks at the pool, asks the policy (policy/roles), and says or does what that has decided.

Instances of the role `both`, and what runs there, are left out. A fault costs one plan and never the service (I7).
"""

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from ares.config import GatewayConfig
from ares.gateway.control.closing import ClosingError
from ares.gateway.control.controller import Controller
from ares.gateway.control.roles import RoleChanges, Seen
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import Pool
from ares.gateway.records.metrics import Metrics
from ares.gateway.session.session import Session
from ares.gateway.tuning import DEFAULT, Tuning
from ares.policy.roles import (
    PressureSettings,
    RolePlan,
    RolePool,
    decode_load,
    mean_step,
    objective_s,
    plan_roles,
    role_policy,
)
from ares.policy.settings import make_settings

logger = logging.getLogger(__name__)

Mode = Literal["off", "advise", "act"]
# Longest drain of an instance whose role was planned to change.
_DEADLINE_S = 120.0


class _Gateway(Protocol):
    """The part of the gateway that is needed to plan."""

    config: GatewayConfig
    pool: Pool
    metrics: Metrics
    controller: Controller
    roles: RoleChanges

    @property
    def sessions(self) -> Mapping[str, Session]: ...


@dataclass(frozen=True, slots=True)
class _Busy:
    at: float
    busy_s: float


class RolePlanner:
    """Plans the roles of a gateway's instances.

    Parameters
    ----------
    gateway
        Knows the instances and their load, and changes roles.
    tuning
        The gateway's times and limits.

    Attributes
    ----------
    mode
        Whether it plans, and whether it carries out what it plans.
    """

    def __init__(self, gateway: _Gateway, tuning: Tuning = DEFAULT) -> None:
        self.mode: Mode = gateway.config.role_planner
        self._gateway = gateway
        self._tuning = tuning
        self._policy = role_policy("pressure", make_settings(PressureSettings, gateway.config.role_planner_settings))
        self._busy: WeakKeyDictionary[Instance, _Busy] = WeakKeyDictionary()
        self._planned_at = time.monotonic()
        self._newest: RolePlan | None = None
        # Instance and role of the newest advice that still holds.
        self._advice: tuple[str, str] | None = None

    @property
    def status(self) -> dict[str, Any]:
        """What it does, and its newest plan."""
        plan = self._newest
        return {
            "planner": self.mode,
            "prefill_load": round(plan.prefill, 3) if plan is not None else None,
            "decode_load": round(plan.decode, 3) if plan is not None else None,
            "advice": dict(zip(("instance", "role"), self._advice, strict=True)) if self._advice else None,
            "reason": plan.reason if plan is not None else None,
        }

    async def run(self) -> None:
        """Plan, period after period, until cancelled; at once nothing where it is off."""
        while self.mode != "off":
            await asyncio.sleep(self._tuning.role_period_s)
            try:
                await self.plan()
            except Exception as error:  # only this plan fails, not the service (I7)
                logger.error("planning roles failed; serving continues", exc_info=error)
                self._gateway.metrics.faults.labels("roles").inc()

    async def plan(self) -> None:
        """Make one plan, and carry it out or show it; DecisionError where the policy failed."""
        instances = [i for i in self._gateway.pool.instances if _single(i) is not None and i.state.hello is not None]
        seen, pool = self._gateway.roles.seen(), self._view(instances)
        memory = self._policy.memory()
        plan = self._newest = plan_roles(self._policy, pool)
        controller = self._gateway.controller
        controller.log.roles(controller.preset, self._policy, memory, pool, plan)
        metrics = self._gateway.metrics
        for role, load in (("prefill", plan.prefill), ("decode", plan.decode)):
            metrics.role_load.labels(role).set(load)
            metrics.desired_instances.labels(role).set(max(1, math.ceil(load)))
        if self._advice is not None and not self._holds(self._advice, pool, plan):
            self._advice = None
        if plan.change is None:
            return
        chosen, role = instances[plan.change.instance], plan.change.to
        if self.mode == "act":
            await self._act(chosen, role, plan.reason, seen)
            return
        self._policy.change_not_made()
        if self._advice is None:
            self._advice = chosen.name, role
            logger.info("%s should become %s: %s", chosen.name, role, plan.reason)
            self._gateway.pool.changes.add(chosen.name, chosen.url, f"advice {role}", plan.reason)

    async def _act(self, chosen: Instance, role: Literal["prefill", "decode"], why: str, seen: Seen) -> None:
        logger.info("%s becomes %s: %s", chosen.name, role, why)
        try:
            await self._gateway.roles.order(chosen, role, _DEADLINE_S, "planned", seen)
        except ClosingError as refusal:
            logger.info("%s does not become %s: %s", chosen.name, role, refusal)
            self._policy.change_not_made()
        else:
            self._gateway.pool.changes.add(chosen.name, chosen.url, f"planned {role}", why)

    @staticmethod
    def _holds(advice: tuple[str, str], pool: RolePool, plan: RolePlan) -> bool:
        """Whether an advice holds: it was not followed, and is worth it still."""
        name, role = advice
        if plan.towards != role or name not in pool.instances:
            return False
        return bool(pool.decodes[pool.instances.index(name)]) == (role == "prefill")

    def _view(self, instances: list[Instance]) -> RolePool:
        now, gateway = time.monotonic(), self._gateway
        elapsed_s, self._planned_at = now - self._planned_at, now
        snapshot = gateway.controller.snapshots.build(gateway.sessions.values())
        requests, tokens = decode_load(snapshot.cluster)
        row = {id(instance): n for n, instance in enumerate(snapshot.instances)}
        decodes = np.array([_single(i) == "decode" for i in instances], dtype=np.bool_)
        busy, queued_s = np.zeros(len(instances)), np.zeros(len(instances))
        for n, instance in enumerate(instances):
            share = self._busy_share(instance, now)
            if not decodes[n]:
                busy[n], queued_s[n] = share, gateway.controller.prefills.queued_s(instance)
        capacity = np.array([float(i.state.capacity_tokens) for i in instances])
        step_s = mean_step(snapshot.cluster)
        rows = [row.get(id(i)) for i in instances]
        return RolePool(
            instances=tuple(i.name for i in instances),
            decodes=decodes,
            able=np.array([_can_change(i) for i in instances], dtype=np.bool_),
            changing=any(i.next_role is not None for i in gateway.pool.instances),
            elapsed_s=elapsed_s,
            busy=busy,
            queued_s=queued_s,
            requests=np.array([0.0 if r is None else requests[r] for r in rows]),
            tokens=np.array([0.0 if r is None else tokens[r] for r in rows]),
            capacity_tokens=capacity,
            waiting_tokens=float(gateway.controller.waiting_tokens),
            step_s=step_s,
            ttft_s=gateway.config.slo_ttft_s,
            others_decode=any(i.role == "both" and i.takes("decode") for i in gateway.pool.instances),
            tpot_s=objective_s(gateway.config.slo_tpot_s, step_s, float(capacity.mean()) if len(capacity) else 0.0),
        )

    def _busy_share(self, instance: Instance, now: float) -> float:
        """Return the share of the time since the last look in which an instance computed."""
        load = instance.state.telemetry
        if load is None:
            return 0.0
        before, self._busy[instance] = self._busy.get(instance), _Busy(now, load.busy_s)
        if before is None or now <= before.at:
            return 0.0
        return min(max((load.busy_s - before.busy_s) / (now - before.at), 0.0), 1.0)


def _single(instance: Instance) -> Literal["prefill", "decode"] | None:
    """Return the one kind of work that an instance that serves has, or will have; None for both, or none."""
    role = instance.next_role or instance.role
    return None if role == "both" or not instance.open else role


def _can_change(instance: Instance) -> bool:
    hello = instance.state.hello
    return instance.next_role is None and hello is not None and {"prefill", "decode"} <= set(hello.roles)
