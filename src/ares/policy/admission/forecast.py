"""Admission by forecast: which requests outside decode enter next, where, and which running request makes room.

One call of `Entrance.decide` for all who wait; the loop that decides is in loop.py, and the simulator calls the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ares.policy.admission.order import QUEUES, memory_time
from ares.policy.admission.settings import AdmissionSettings
from ares.policy.admission.state import (
    DUE,
    FITS,
    INSIDE,
    OLDEST,
    RESUME,
    ROOM_MADE,
    RUNS_AGAIN,
    SUSPEND,
    SUSPENDED,
    WAITING,
    Horizon,
    Instances,
    Knobs,
    Queue,
    Requests,
)
from ares.policy.admission.suspension import SuspendSettings, final_slack_s
from ares.policy.cluster import BoolArray, Cluster, FloatArray, IntArray
from ares.policy.forecast import forecast, geometric_grid, quantile_weights

GRID = geometric_grid(16_000, 64)
"""Steps ahead at which it forecasts: a peak between two points is underestimated by a sixth at most."""
_WHY = {
    FITS: "fits",
    OLDEST: "has waited longest",
    ROOM_MADE: "another is suspended for it",
    DUE: "must run again",
    RUNS_AGAIN: "runs again",
}


@dataclass(frozen=True, slots=True)
class Progress:
    """How requests stand against their objectives; all arrays have one element a request.

    Attributes
    ----------
    generated
        Output tokens so far.
    age_s, elapsed_s
        Seconds since it arrived, and since its first token (NaN: it has none).
    ttft_s, tpot_s, gap_s
        The objectives: time to first token, seconds a token, longest gap in the stream (infinite: none).
    longest_gap_s
        Longest gap that the stream has had.
    rank
        Class of each: a smaller one goes before every larger one.
    """

    generated: IntArray
    age_s: FloatArray
    elapsed_s: FloatArray
    ttft_s: FloatArray
    tpot_s: FloatArray
    gap_s: FloatArray
    longest_gap_s: FloatArray
    rank: IntArray

    @property
    def silent(self) -> BoolArray:
        """Whether the longest gap of the stream has missed its objective."""
        missed: BoolArray = self.longest_gap_s > self.gap_s
        return missed

    @property
    def late(self) -> BoolArray:
        """Whether the first token has missed its objective."""
        return self.age_s - np.nan_to_num(self.elapsed_s) > self.ttft_s

    def spare(self, remaining: FloatArray, step_s: FloatArray | float) -> tuple[FloatArray, BoolArray]:
        """Return the seconds that running requests may stand still, and which miss their objectives even without.

        Parameters
        ----------
        remaining
            Quantiles of what each will still generate, shape (R, Q).
        step_s
            Seconds a token takes, shape (R,) or one for all.
        """
        known = (self.tpot_s, self.generated, np.nan_to_num(self.elapsed_s))
        least: FloatArray = final_slack_s(*known, remaining[:, 0], step_s)  # type: ignore[arg-type,assignment]
        most: FloatArray = final_slack_s(*known, remaining[:, -1], step_s)  # type: ignore[arg-type,assignment]
        return np.minimum(least, self.gap_s), self.late | (most < 0.0)


@dataclass(frozen=True, slots=True)
class Candidates:
    """W requests outside decode: prefilled ones that wait, and suspended ones.

    Attributes
    ----------
    requests
        Identifiers, length W.
    tokens
        KV tokens that each brings along, shape (W,).
    remaining_tokens
        Quantiles of what each will still generate, at the cluster's levels, shape (W, Q).
    rank
        Class of each, shape (W,): a smaller one goes before every larger one.
    waited_s
        Seconds since it arrived, or was suspended, shape (W,).
    suspended
        Whether it has run before, shape (W,).
    progress
        How it stands against its objectives.
    barred
        Instances that each does not enter, shape (W, I): they have refused it, or would not restore its state. None:
        there are none.
    """

    requests: Sequence[str]
    tokens: IntArray
    remaining_tokens: FloatArray
    rank: IntArray
    waited_s: FloatArray
    suspended: BoolArray
    progress: Progress
    barred: BoolArray | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision: a candidate enters `instance`, or the running row `index` of the cluster is suspended there."""

    kind: Literal["enter", "resume", "suspend"]
    index: int
    instance: int
    reason: str


class Entrance:
    """Decides who enters. It keeps the credit of the oldest from one call to the next, and nothing else.

    Parameters
    ----------
    admission
        Settings of admission and order.
    suspension
        Settings of suspension; None: nobody is suspended.
    queue
        Order of the waiting: `volume` or `fcfs` (order.py).
    """

    def __init__(self, admission: AdmissionSettings, suspension: SuspendSettings | None, queue: str = "volume") -> None:
        self.admission = admission
        self.suspension = suspension
        if queue not in QUEUES:
            raise ValueError(f"unknown order of the waiting {queue!r}; known: {', '.join(QUEUES)}")
        self.queue = queue
        self.age_credit = 0.0

    def decide(self, cluster: Cluster, candidates: Candidates, running: Progress) -> list[Entry]:
        """Return what to do now, in this order.

        Parameters
        ----------
        cluster
            The decode pool; requests that are on their way to an instance are rows there.
        candidates
            Who is outside.
        running
            How the rows of the cluster stand, R elements.
        """
        if not len(candidates.tokens) or not cluster.open.any():
            return []
        from ares.policy.admission import loop  # imports numba, where it is installed: only where it is needed

        # Without a cost model of steps nobody can say what a request has to spare.
        suspension = self.suspension if cluster.step_base_s is not None else None
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
            knobs(self.admission, suspension),
            decided,
            numbers,
        )
        return [
            _entry(candidates, *one, *said)
            for one, said in zip(decided[:count].tolist(), numbers[:count].tolist(), strict=True)
        ]

    def _queue(self, candidates: Candidates, *, suspends: bool) -> Queue:
        from ares.policy.admission import loop

        held = np.flatnonzero(~candidates.suspended)
        middle = candidates.remaining_tokens[:, candidates.remaining_tokens.shape[1] // 2]
        size = memory_time(candidates.tokens.astype(np.float64), middle)
        key = size if self.queue == "volume" else -candidates.waited_s
        # A request that has missed its first token goes behind all that have not.
        missed = (candidates.waited_s > candidates.progress.ttft_s).astype(np.int64) * int(suspends)
        order = np.empty(len(held), np.int64)
        for length, request in enumerate(held.tolist()):
            loop.insert_in_order(order, length, request, candidates.rank, missed, key)
        by_age = held[np.argsort(-candidates.waited_s[held], kind="stable")]
        return Queue(order, by_age, np.flatnonzero(candidates.suspended))


def knobs(admission: AdmissionSettings, suspension: SuspendSettings | None) -> Knobs:
    """Return the settings as the loop reads them."""
    usual = suspension or SuspendSettings()
    return Knobs(
        deviations=admission.deviations,
        headroom=admission.headroom,
        tpot_margin=admission.tpot_margin,
        age_share=admission.age_share,
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
    """Return the candidates and behind them the rows of the cluster, on a clock that stands at 0."""
    waiting, rows = len(candidates.tokens), len(cluster.location)
    stand = candidates.progress
    remaining = cluster.remaining_tokens
    if remaining is None:
        remaining = np.full((rows, len(cluster.levels)), np.nan)
    outside = np.where(candidates.suspended, SUSPENDED, WAITING)
    barred = candidates.barred
    excluded = np.zeros((0, 0), np.int64)
    if barred is not None:
        excluded = np.concatenate([barred, np.zeros((rows, barred.shape[1]), np.bool_)]).astype(np.int64)

    def both(first: IntArray | FloatArray, second: IntArray | FloatArray) -> FloatArray:
        return np.concatenate([first, second]).astype(np.float64)

    return Requests(
        tokens=np.concatenate([candidates.tokens, cluster.resident_tokens]).astype(np.int64),
        remaining=np.concatenate([candidates.remaining_tokens, remaining]).astype(np.float64),
        generated=np.concatenate([stand.generated, running.generated]).astype(np.int64),
        arrived_s=-both(stand.age_s, running.age_s),
        first_token_s=-both(stand.elapsed_s, running.elapsed_s),
        waits_since_s=-both(candidates.waited_s, np.zeros(rows)),
        ttft_s=both(stand.ttft_s, running.ttft_s),
        tpot_s=both(stand.tpot_s, running.tpot_s),
        gap_s=both(stand.gap_s, running.gap_s),
        longest_gap_s=both(stand.longest_gap_s, running.longest_gap_s),
        rank=np.concatenate([candidates.rank, running.rank]).astype(np.int64),
        outside=np.concatenate([outside, np.full(rows, INSIDE)]).astype(np.int64),
        movable=np.concatenate([np.zeros(waiting, np.int64), cluster.movable.astype(np.int64)]),
        excluded=excluded,
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
        expected=ahead.held.copy(),
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


def _entry(
    candidates: Candidates, kind: int, request: int, instance: int, why: int, tokens: float, said: float, limit: float
) -> Entry:
    """Put a decision of the loop into words."""
    if kind == SUSPEND:
        spare = f"can stand still for {said:.1f} s" if np.isfinite(said) else "misses its objective anyway"
        spare = "misses its gap by it" if said == -np.inf else spare
        reason = f"{spare}; {tokens:.0f} tokens make room for {candidates.requests[why]}"
        return Entry("suspend", request - len(candidates.tokens), instance, reason)
    reason = f"{_WHY[why]}; {tokens:.0f} tokens, expected peak {said:.0f} of {limit:.0f}"
    return Entry("resume" if kind == RESUME else "enter", request, instance, reason)
