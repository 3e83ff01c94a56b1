"""`forecast`: which requests are admitted to decode next, where, and which running request is suspended for them.

One call of `decide` covers all waiting requests; the loop that decides is in loop.py, and the simulator calls the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ares.policy.admission.base import Admission, AdmissionDecision, Candidates, Progress, register
from ares.policy.admission.order import check_order, is_by_memory_time, memory_time
from ares.policy.admission.settings import MOST_CACHED_WEIGHT, AdmissionSettings
from ares.policy.admission.state import (
    ADMITTED,
    DUE,
    FITS,
    OLDEST,
    RESUME,
    ROOM_MADE,
    RUNS_AGAIN,
    SUSPEND,
    SUSPENDED,
    WAITING,
    Horizon,
    Instances,
    LoopSettings,
    Queue,
    Requests,
)
from ares.policy.admission.suspension import SuspendSettings
from ares.policy.cluster import Cluster, FloatArray, IntArray
from ares.policy.forecast import forecast, geometric_grid, quantile_weights
from ares.policy.settings import in_range

GRID = geometric_grid(16_000, 64)
"""Steps ahead at which it forecasts; a peak between two points is underestimated by a sixth at most."""
_WHY = {
    FITS: "fits",
    OLDEST: "has waited longest",
    ROOM_MADE: "another is suspended for it",
    DUE: "must resume now",
    RUNS_AGAIN: "resumes",
}


_ADMISSION, _SUSPENSION = AdmissionSettings(), SuspendSettings()


@dataclass(frozen=True, slots=True)
class ForecastSettings:
    """Settings of `forecast`: of admission (settings.py), of the order (order.py), and of suspension (suspension.py).

    Attributes
    ----------
    order
        `shortest_memory_time` or `fcfs`: which request is admitted first, and which one an instance preempts.
    suspends
        Whether a long request with slack is suspended for one that waits. The settings below are those of
        `SuspendSettings`, the ones above those of `AdmissionSettings`.
    """

    deviations: float = _ADMISSION.deviations
    headroom: float = _ADMISSION.headroom
    tpot_margin: float = _ADMISSION.tpot_margin
    age_share: float = _ADMISSION.age_share
    cached_weight: float = _ADMISSION.cached_weight
    order: str = "shortest_memory_time"
    suspends: bool = False
    after_s: float = _SUSPENSION.after_s
    least_slack_s: float = _SUSPENSION.least_slack_s
    least_gap_s: float = _SUSPENSION.least_gap_s
    urgent_s: float = _SUSPENSION.urgent_s
    urgent_steps: float = _SUSPENSION.urgent_steps
    longest_s: float = _SUSPENSION.longest_s
    longest_missed_s: float = _SUSPENSION.longest_missed_s
    ratio: float = _SUSPENSION.ratio

    def __post_init__(self) -> None:
        check_order(self.order)
        in_range(self, headroom=1.0, tpot_margin=1.0, age_share=1.0, cached_weight=MOST_CACHED_WEIGHT)

    @property
    def admission(self) -> AdmissionSettings:
        """Those of admission alone."""
        return AdmissionSettings(**_shared(self, AdmissionSettings))

    @property
    def suspension(self) -> SuspendSettings | None:
        """Those of suspension alone; None: no request is suspended."""
        return SuspendSettings(**_shared(self, SuspendSettings)) if self.suspends else None

    def for_objectives(self, ttft_s: float) -> "ForecastSettings":
        """Return the settings for another TTFT objective, with which the times of suspension scale."""
        scaled = SuspendSettings(**_shared(self, SuspendSettings)).for_objectives(ttft_s)
        return replace(self, **_shared(scaled, ForecastSettings))


def _shared(settings: Any, kind: type) -> dict[str, Any]:
    """Return the values of the settings that a class has too."""
    names = {field.name for field in fields(settings)} & {field.name for field in fields(kind)}
    return {name: getattr(settings, name) for name in names}


@register("forecast")
class Forecast(Admission):
    """Admits what fits by forecast; its only state is the credit of the oldest request."""

    Settings = ForecastSettings
    settings: ForecastSettings
    dispatch = "forecast"
    predicts = True
    needs_predictions = True
    quick = True
    age_credit = 0.0

    @classmethod
    def prepare(cls) -> None:
        """Compile the loop."""
        from ares.policy.admission import loop  # imports numba, where it is installed: only where it is needed

        loop.prepare()

    @classmethod
    def loop_settings(cls, settings: ForecastSettings) -> LoopSettings:
        """Return the settings as the loop reads them."""
        return make_loop_settings(settings.admission, settings.suspension)

    @classmethod
    def sees_prefixes(cls, settings: ForecastSettings) -> bool:
        """Return whether cached tokens count."""
        return bool(settings.cached_weight)

    @classmethod
    def preempts_largest(cls, settings: ForecastSettings) -> bool:
        """Return whether the order is by memory-time."""
        return is_by_memory_time(settings.order)

    @classmethod
    def avoids_oom(cls, settings: ForecastSettings) -> bool:
        """Return whether it suspends: only then out-of-memory avoidance is part of the preset."""
        return settings.suspends

    def memory(self) -> dict[str, float]:
        """Return the credit of the oldest."""
        return {"age_credit": self.age_credit}

    def remember(self, memory: Mapping[str, float]) -> None:
        """Restore the credit of the oldest."""
        self.age_credit = float(memory["age_credit"])

    def decide(self, cluster: Cluster, candidates: Candidates, running: Progress) -> list[AdmissionDecision]:
        """Return what to do now, in this order."""
        if not len(candidates.tokens) or not cluster.open.any():
            return []
        from ares.policy.admission import loop  # imports numba, where it is installed: only where it is needed

        # Without a step-time model the slack is unknown.
        suspension = self.settings.suspension if cluster.step_base_s is not None else None
        requests = _requests(cluster, candidates, running)
        waiting = len(candidates.tokens)
        decided, numbers = np.empty((2 * waiting + 2, 4), np.int64), np.empty((2 * waiting + 2, 3))
        count, self.age_credit = loop.admit(
            0.0,
            self.age_credit,
            _instances(cluster, waiting),
            requests,
            self._queue(candidates, suspends=suspension is not None),
            Horizon(GRID.astype(np.float64), quantile_weights(cluster.levels), cluster.block_tokens),
            make_loop_settings(self.settings.admission, suspension),
            decided,
            numbers,
        )
        return [
            _decision(candidates, *one, *values)
            for one, values in zip(decided[:count].tolist(), numbers[:count].tolist(), strict=True)
        ]

    def _queue(self, candidates: Candidates, *, suspends: bool) -> Queue:
        from ares.policy.admission import loop

        waiting = np.flatnonzero(~candidates.suspended)
        middle = candidates.remaining_tokens[:, candidates.remaining_tokens.shape[1] // 2]
        size = memory_time(candidates.tokens.astype(np.float64), middle)
        key = size if is_by_memory_time(self.settings.order) else -candidates.waited_s
        # A request that has missed its TTFT goes behind all that have not.
        ttft_missed = (candidates.waited_s > candidates.progress.ttft_s).astype(np.int64) * int(suspends)
        order = np.empty(len(waiting), np.int64)
        for length, request in enumerate(waiting.tolist()):
            loop.insert_in_order(order, length, request, candidates.rank, ttft_missed, key)
        by_age = waiting[np.argsort(-candidates.waited_s[waiting], kind="stable")]
        return Queue(order, by_age, np.flatnonzero(candidates.suspended))


def make_loop_settings(admission: AdmissionSettings, suspension: SuspendSettings | None) -> LoopSettings:
    """Return the settings as the loop reads them."""
    usual = suspension or SuspendSettings()
    return LoopSettings(
        deviations=admission.deviations,
        headroom=admission.headroom,
        tpot_margin=admission.tpot_margin,
        age_share=admission.age_share,
        cached_weight=admission.cached_weight,
        suspends=float(suspension is not None),
        after_s=usual.after_s,
        least_slack_s=usual.least_slack_s,
        least_gap_s=max(usual.least_gap_s, usual.least_slack_s),
        urgent_s=usual.urgent_s,
        urgent_steps=usual.urgent_steps,
        longest_s=usual.longest_s,
        longest_missed_s=usual.longest_missed_s,
        ratio=usual.ratio,
    )


def _requests(cluster: Cluster, candidates: Candidates, running: Progress) -> Requests:
    """Return the candidates followed by the rows of the cluster; times are relative to now."""
    waiting, rows = len(candidates.tokens), len(cluster.location)
    outside = candidates.progress
    remaining = cluster.remaining_tokens
    if remaining is None:
        remaining = np.full((rows, len(cluster.levels)), np.nan)
    state = np.where(candidates.suspended, SUSPENDED, WAITING)
    excluded = np.zeros((0, 0), np.int64)
    if candidates.excluded is not None:
        none = np.zeros((rows, candidates.excluded.shape[1]), np.bool_)
        excluded = np.concatenate([candidates.excluded, none]).astype(np.int64)
    cached = np.zeros((0, 0), np.int64)
    if candidates.cached_tokens is not None:
        # Only candidates are looked at.
        cached = np.ascontiguousarray(candidates.cached_tokens, np.int64)

    def both(first: IntArray | FloatArray, second: IntArray | FloatArray) -> FloatArray:
        return np.concatenate([first, second]).astype(np.float64)

    return Requests(
        tokens=np.concatenate([candidates.tokens, cluster.resident_tokens]).astype(np.int64),
        remaining=np.concatenate([candidates.remaining_tokens, remaining]).astype(np.float64),
        generated=np.concatenate([outside.generated, running.generated]).astype(np.int64),
        arrived_s=-both(outside.age_s, running.age_s),
        first_token_s=-both(outside.elapsed_s, running.elapsed_s),
        waiting_since_s=-both(candidates.waited_s, np.zeros(rows)),
        ttft_s=both(outside.ttft_s, running.ttft_s),
        tpot_s=both(outside.tpot_s, running.tpot_s),
        gap_s=both(outside.gap_s, running.gap_s),
        longest_gap_s=both(outside.longest_gap_s, running.longest_gap_s),
        rank=np.concatenate([candidates.rank, running.rank]).astype(np.int64),
        status=np.concatenate([state, np.full(rows, ADMITTED)]).astype(np.int64),
        movable=np.concatenate([np.zeros(waiting, np.int64), cluster.movable.astype(np.int64)]),
        excluded=excluded,
        cached=cached,
    )


def _instances(cluster: Cluster, first_row: int) -> Instances:
    """Return the instances with their forecast; rows of the cluster are requests from index `first_row` on."""
    ahead = forecast(cluster, GRID)
    count = np.bincount(cluster.location, minlength=len(cluster.instances))
    rows = np.zeros((len(count), int(count.max())), np.int64)
    order = np.argsort(cluster.location, kind="stable")
    within = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
    rows[cluster.location[order], within] = order + first_row
    nothing = np.zeros(len(count))

    def cost(values: FloatArray | None) -> FloatArray:
        return nothing if values is None else np.ascontiguousarray(values, np.float64)

    return Instances(
        expected=ahead.allocated.copy(),
        variance=ahead.variance.copy(),
        memory=cluster.capacity_tokens.astype(np.int64),
        closed=(~cluster.open).astype(np.int64),
        load=count,
        step_base_s=cost(cluster.step_base_s),
        step_request_s=cost(cluster.step_request_s),
        step_token_s=cost(cluster.step_token_s),
        row_request=rows,
        row_count=count,
    )


def _decision(
    candidates: Candidates, kind: int, request: int, instance: int, why: int, tokens: float, value: float, limit: float
) -> AdmissionDecision:
    """Return a decision of the loop with its reason; `value` is the slack of a suspended request, else the peak."""
    if kind == SUSPEND:
        cost = f"can be suspended for {value:.1f} s" if np.isfinite(value) else "misses its objectives anyway"
        cost = "misses its gap objective by it" if value == -np.inf else cost
        reason = f"{cost}; {tokens:.0f} tokens make room for {candidates.requests[why]}"
        return AdmissionDecision("suspend", request - len(candidates.tokens), instance, reason)
    reason = f"{_WHY[why]}; {tokens:.0f} tokens, expected peak {value:.0f} of {limit:.0f}"
    return AdmissionDecision("resume" if kind == RESUME else "admit", request, instance, reason)
