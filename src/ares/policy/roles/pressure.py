"""`pressure`: the role with more load for each of its instances gets one of the other role's, where that helps.

The load of each role is counted in instances that it would keep busy. Prefill: the share of time in which instances
compute, and what is queued, as a share of what may be queued within the objective of the first token. Decode: the
larger of two, what the forecast of memory takes of the KV, and how many instances keep the mean step within the
objective of time per token. The pressure of a role is its load by the number of its instances; a change is worth its
moves where the larger of the two pressures falls by a margin, for some time on end, and none was made lately.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ares.policy.roles.base import ChangeTo, RoleChange, RolePlan, RolePool, Roles, register
from ares.policy.settings import in_range

# An objective that leaves less than this share of an empty step for the requests is as good as out of reach.
_LEAST_OF_BASE = 0.1


@dataclass(frozen=True, slots=True)
class PressureSettings:
    """Settings.

    Attributes
    ----------
    smoothing_s
        Time constant with which the load of each role is smoothed.
    queue_share
        Share of the objective of the first token that prompts may wait in a queue: so much work is the load of one
        instance.
    busy_share
        Share of time in which an instance that prefills may compute.
    memory_share
        Share of the KV that the forecast may take.
    least_pressure
        Below this pressure nothing changes, whatever the ratio.
    margin
        By how much the larger pressure must fall.
    patience_s
        For how long a change must be worth it before it is made.
    cooldown_s
        Seconds after a change in which no other one is made.
    """

    smoothing_s: float = 5.0
    queue_share: float = 1.0
    busy_share: float = 0.85
    memory_share: float = 0.9
    least_pressure: float = 0.7
    margin: float = 0.2
    patience_s: float = 4.0
    cooldown_s: float = 30.0

    def __post_init__(self) -> None:
        in_range(self, queue_share=1.0, busy_share=1.0, memory_share=1.0)
        for name in ("queue_share", "busy_share", "memory_share"):
            if not getattr(self, name):
                raise ValueError(f"setting {name} must be above 0")


@dataclass(frozen=True, slots=True)
class _Wish:
    """The role that one more instance is to have, why, and whether that cannot wait."""

    to: ChangeTo | None
    reason: str
    urgent: bool = False


@register("pressure")
class Pressure(Roles):
    """The larger pressure falls."""

    Settings = PressureSettings

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        # Smoothed loads; NaN before the first view.
        self._prefill = self._decode = math.nan
        # Seconds for which the present direction has been worth a change: above 0 to prefill, below 0 to decode.
        self._for_s = 0.0
        # Seconds since a change was last under way, or has been decided, or the instances were others.
        self._since_change_s = math.inf
        # The two before the newest change was decided.
        self._before_change = (0.0, math.inf)
        # Instances of each role in the newest view; NaN before the first.
        self._counts = (math.nan, math.nan)

    def plan(self, pool: RolePool) -> RolePlan:
        """Return what the load needs, and at most one change."""
        self._smooth(pool)
        wish = self._wish(pool)
        plan = RolePlan(self._prefill, self._decode, wish.to, wish.reason)
        if wish.to is None:
            self._for_s = 0.0
            return plan
        direction = 1.0 if wish.to == "prefill" else -1.0
        self._for_s = self._for_s + direction * pool.elapsed_s if self._for_s * direction > 0.0 else direction * 1e-9
        giver = self._giver(pool, wish.to)
        if not wish.urgent and abs(self._for_s) < self.settings.patience_s:
            return replace(plan, reason=f"{wish.reason}, but not for long yet")
        if not wish.urgent and self._since_change_s < self.settings.cooldown_s:
            return replace(plan, reason=f"{wish.reason}, but a role has just changed")
        if giver is None:
            return replace(plan, reason=f"{wish.reason}, but no instance can change its role")
        self._before_change = self._for_s, self._since_change_s
        self._for_s = self._since_change_s = 0.0
        return replace(plan, change=RoleChange(giver, wish.to))

    def change_not_made(self) -> None:
        """Take back that a change was decided: the next one need not wait for it."""
        self._for_s, self._since_change_s = self._before_change

    def _smooth(self, pool: RolePool) -> None:
        counts = float(np.sum(~pool.decodes)), float(np.sum(pool.decodes))
        others = not math.isnan(self._counts[0]) and counts != self._counts
        self._counts = counts
        self._since_change_s = 0.0 if pool.changing or others else self._since_change_s + pool.elapsed_s
        prefill, decode = self._loads(pool)
        share = -math.expm1(-pool.elapsed_s / self.settings.smoothing_s) if self.settings.smoothing_s else 1.0
        self._prefill = prefill if math.isnan(self._prefill) else self._prefill + share * (prefill - self._prefill)
        self._decode = decode if math.isnan(self._decode) else self._decode + share * (decode - self._decode)

    def _loads(self, pool: RolePool) -> tuple[float, float]:
        """Return the load of each role now, in instances."""
        settings, prefills = self.settings, ~pool.decodes
        queued = float(pool.queued_s[prefills].sum()) / (settings.queue_share * pool.ttft_s)
        prefill = float(pool.busy[prefills].sum()) / settings.busy_share + queued
        tokens = float(pool.tokens.sum()) + pool.waiting_tokens
        capacity = float(pool.capacity_tokens.mean()) * settings.memory_share if len(pool.instances) else 0.0
        memory = tokens / capacity if capacity else 0.0
        base_s, request_s, token_s = pool.step_s
        work_s = request_s * float(pool.requests.sum()) + token_s * tokens
        steps = _instances_for(work_s, pool.tpot_s - base_s, base_s)
        return prefill, max(memory, steps)

    def _wish(self, pool: RolePool) -> _Wish:
        decode = int(pool.decodes.sum())
        prefill = len(pool.instances) - decode
        if not decode and prefill > 1 and not pool.others_decode:
            return _Wish("decode", "no instance decodes", urgent=True)
        if not prefill or not decode or prefill + decode < 3:
            return _Wish(None, "there is no instance to spare")
        now = self._pressures(prefill, decode)
        more: ChangeTo = "prefill" if now[0] > now[1] else "decode"
        loads = (f"{self._prefill:.2f} of {prefill}", f"{self._decode:.2f} of {decode}")
        shown = f"prefill has load for {loads[0]} instances, decode for {loads[1]}"
        if max(now) < self.settings.least_pressure:
            return _Wish(None, f"{shown}: both are low")
        if (decode if more == "prefill" else prefill) < 2:
            return _Wish(None, f"{shown}, but the other role has one instance only")
        step = 1 if more == "prefill" else -1
        then = self._pressures(prefill + step, decode - step)
        if max(now) - max(then) < self.settings.margin:
            return _Wish(None, f"{shown}: no other ratio is better")
        return _Wish(more, f"{shown}: the larger share falls from {max(now):.2f} to {max(then):.2f}")

    def _pressures(self, prefill: int, decode: int) -> tuple[float, float]:
        return self._prefill / prefill, self._decode / decode

    def _giver(self, pool: RolePool, to: ChangeTo) -> int | None:
        """Return the instance of the other role with the least to move or to wait for."""
        load = pool.tokens if to == "prefill" else pool.queued_s
        able = np.flatnonzero(pool.able & (pool.decodes == (to == "prefill"))).tolist()
        return min(able, key=lambda n: float(load[n]), default=None)

    def memory(self) -> dict[str, float]:
        """Return the smoothed loads, and since when a change has been worth it; what is not known yet is left out."""
        known = {
            "prefill": self._prefill,
            "decode": self._decode,
            "for_s": self._for_s,
            "since_change_s": self._since_change_s,
            "prefill_instances": self._counts[0],
            "decode_instances": self._counts[1],
        }
        return {name: value for name, value in known.items() if math.isfinite(value)}

    def remember(self, memory: Mapping[str, float]) -> None:
        """Restore it."""

        def known(name: str, otherwise: float) -> float:
            return float(memory.get(name, otherwise))

        self._prefill, self._decode = known("prefill", math.nan), known("decode", math.nan)
        self._for_s, self._since_change_s = known("for_s", 0.0), known("since_change_s", math.inf)
        self._counts = known("prefill_instances", math.nan), known("decode_instances", math.nan)


def _instances_for(work_s: float, within_s: float, base_s: float) -> float:
    """Return how many instances keep the mean step within its objective.

    Where the objective cannot be met even by an empty instance, more of them do not help. Shortly above that each gain
    takes many more instances than the one before it: they count ever less, so that the number has a bound.

    Parameters
    ----------
    work_s
        What all requests add to a step, if one instance had them.
    within_s, base_s
        By how much a step may be longer than an empty one, and the time of that.
    """
    least_s = _LEAST_OF_BASE * base_s
    if within_s <= 0.0:
        return 0.0
    return work_s / within_s if within_s >= least_s else work_s * within_s / least_s**2
