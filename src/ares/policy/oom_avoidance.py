"""Out-of-memory avoidance: a request leaves an instance that is about to run out of memory, before one is preempted.

The rebalancer spreads load, and may wait a few periods where a move gains little. Memory cannot wait: when the expected
tokens of an instance exceed its capacity within the time that a move takes, the smallest request whose tokens are
enough is moved to where it fits. Where it fits nowhere, the request with the most slack is suspended, and resumes where
there is room. That costs a prefill, as a preemption does, but not on the full instance, and it is not the request that
vLLM would have preempted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ares.policy.admission import Progress, memory_time
from ares.policy.admission.forecast import GRID
from ares.policy.cluster import Cluster, FloatArray, IntArray
from ares.policy.forecast import forecast, prepare_forecast, quantile_weights
from ares.policy.rebalance.base import MigrationDecision

NO_TARGET = -1


@dataclass(frozen=True, slots=True)
class OomAvoidanceSettings:
    """How far ahead memory must suffice, and what a target must have room for.

    Attributes
    ----------
    lookahead_s
        Seconds ahead at which memory must still suffice: a decision period and a move.
    deviations
        Standard deviations above the expectation that must fit at the target.
    headroom
        Share of a target's KV that must stay free.
    horizon
        Steps ahead, at most, for which the request must fit the target: a move for a while beats a suspension.
    """

    lookahead_s: float = 2.0
    deviations: float = 1.0
    headroom: float = 0.02
    horizon: int = 250


@dataclass(frozen=True, slots=True)
class OomAction:
    """Row `request` leaves `source` for `target`, or is suspended where that is `NO_TARGET`."""

    request: int
    source: int
    target: int
    reason: str


def lookahead_steps(cluster: Cluster, lookahead_s: float) -> IntArray:
    """Return how many steps each instance makes in `lookahead_s` seconds, at most `FURTHEST`, shape (I,).

    50 a second where the step time is unknown.
    """
    from ares.policy.oom_avoidance_loops import FURTHEST
    from ares.policy.oom_avoidance_loops import lookahead_steps as write  # imports numba: only where it is needed

    steps = np.empty(len(cluster.instances), np.int64)
    if cluster.step_base_s is None or cluster.step_request_s is None or cluster.step_token_s is None:
        steps[:] = int(min(np.ceil(lookahead_s * 50.0), FURTHEST))
        return steps
    write(
        np.ascontiguousarray(cluster.location, np.int64),
        np.ascontiguousarray(cluster.resident_tokens, np.int64),
        np.ascontiguousarray(cluster.promised_tokens, np.int64),
        (
            np.ascontiguousarray(cluster.step_base_s, np.float64),
            np.ascontiguousarray(cluster.step_request_s, np.float64),
            np.ascontiguousarray(cluster.step_token_s, np.float64),
        ),
        lookahead_s,
        steps,
    )
    return steps


def avoid_oom(
    cluster: Cluster, settings: OomAvoidanceSettings, running: Progress | Callable[[], Progress]
) -> list[OomAction]:
    """Return the actions of one period, at most one per instance, the one that lacks most tokens first.

    Parameters
    ----------
    cluster
        The decode pool.
    settings
        What must fit, and for how long.
    running
        Progress of its requests, R elements, or a function that returns it, called only where one must be suspended.
    """
    if not len(cluster.location):
        return []
    steps = lookahead_steps(cluster, settings.lookahead_s)
    overflow = _overflow(cluster, steps)
    sources = np.flatnonzero(overflow > 0.0)
    if not len(sources):
        return []
    return _choose_actions(
        cluster, settings, running, sources[np.argsort(-overflow[sources], kind="stable")], steps, overflow
    )


def _overflow(cluster: Cluster, steps: IntArray) -> FloatArray:
    """Return by how many tokens each instance exceeds its memory in so many steps, shape (I,); -1 where it does not.

    Most of the time there is room even where no request ends, which needs no forecast.
    """
    from ares.policy.oom_avoidance_loops import near_limit

    overflow = np.full(len(steps), -1.0)
    near, rows = near_limit(
        np.ascontiguousarray(cluster.location, np.int64),
        np.ascontiguousarray(cluster.resident_tokens, np.int64),
        np.ascontiguousarray(cluster.promised_tokens, np.int64),
        np.ascontiguousarray(cluster.capacity_tokens, np.int64),
        steps,
        cluster.block_tokens,
        np.empty(len(cluster.location), np.int64),
    )
    if len(near):
        soon = np.unique(np.append(steps[near], 0))
        part = replace(
            cluster,
            instances=tuple(cluster.instances[instance] for instance in near.tolist()),
            promised_tokens=cluster.promised_tokens[near],
            location=np.searchsorted(near, cluster.location[rows]),
            resident_tokens=cluster.resident_tokens[rows],
            remaining_tokens=None if cluster.remaining_tokens is None else cluster.remaining_tokens[rows],
        )
        allocated = forecast(part, soon).allocated[np.arange(len(near)), np.searchsorted(soon, steps[near])]
        overflow[near] = allocated - cluster.capacity_tokens[near]
    return overflow


def _choose_actions(
    cluster: Cluster,
    settings: OomAvoidanceSettings,
    running: Progress | Callable[[], Progress],
    sources: IntArray,
    steps: IntArray,
    overflow: FloatArray,
) -> list[OomAction]:
    """Choose which request leaves each source, in this order, and where to, each with its reason."""
    from ares.policy.oom_avoidance_loops import choose_targets, find_candidates

    movable = cluster.movable if cluster.commanded is None else cluster.movable | cluster.commanded
    remaining = cluster.remaining_tokens
    if remaining is None:
        remaining = np.full((len(cluster.location), len(cluster.levels)), np.inf)
    running_rows = (
        np.ascontiguousarray(cluster.location, np.int64),
        np.ascontiguousarray(cluster.resident_tokens, np.int64),
        np.ascontiguousarray(movable, np.bool_),
        np.ascontiguousarray(remaining, np.float64),
    )
    bounds = np.empty((len(sources), 2), np.int64)
    candidates = find_candidates(running_rows, sources, steps, overflow, bounds)
    relieved = np.flatnonzero(bounds[:, 0] < bounds[:, 1])
    if not len(relieved):
        return []
    grid = GRID[: max(1, int(np.searchsorted(GRID, settings.horizon, side="left")))]
    ahead = forecast(cluster, grid)
    closed = (~cluster.open).astype(np.int64)
    closed[sources] = 1
    leaves, targets = candidates[bounds[relieved, 0]], np.empty(len(relieved), np.int64)
    choose_targets(
        running_rows,
        leaves,
        np.ascontiguousarray(cluster.capacity_tokens, np.int64),
        closed,
        (ahead.allocated, ahead.variance),
        (grid.astype(np.float64), quantile_weights(cluster.levels)),
        cluster.block_tokens,
        settings.horizon,
        settings.deviations,
        settings.headroom,
        targets,
    )
    slack: FloatArray | None = None
    oom_actions: list[OomAction] = []
    for place, row, target in zip(relieved.tolist(), leaves.tolist(), targets.tolist(), strict=True):
        source = int(sources[place])
        tokens_short = f"lacks {overflow[source]:.0f} of {cluster.capacity_tokens[source]} tokens"
        cause = f"{cluster.instances[source]} {tokens_short} in {steps[source]} steps"
        if target >= 0:
            tokens = int(cluster.resident_tokens[row])
            oom_actions.append(
                OomAction(row, source, target, f"{cause}; {tokens} tokens fit {cluster.instances[target]}")
            )
            continue
        if slack is None:
            slack = _slack_s(cluster, running if isinstance(running, Progress) else running())
        enough = candidates[bounds[place, 0] : bounds[place, 1]]
        suspended = int(enough[_index_of_most_slack(slack[enough], cluster, enough)])
        reason = f"{cause}; no request fits elsewhere; this one can be suspended for {slack[suspended]:.1f} s"
        oom_actions.append(OomAction(suspended, source, NO_TARGET, reason))
    return oom_actions


def prepare() -> None:
    """Compile the inner loops, which takes seconds, or load them from the cache."""
    from ares.policy import oom_avoidance_loops as loops  # imports numba: only where it is needed

    prepare_forecast()
    loops.prepare()


def exclude_conflicts(moves: list[MigrationDecision], oom_actions: list[OomAction]) -> list[MigrationDecision]:
    """Return the moves of a rebalancer that touch no instance of an out-of-memory action."""
    ends = {one.source for one in oom_actions} | {one.target for one in oom_actions}
    return [move for move in moves if move.source not in ends and move.target not in ends]


def _slack_s(cluster: Cluster, running: Progress) -> FloatArray:
    """Return the seconds for which each request may be suspended, shape (R,).

    They are infinite where its gap is missed, and 0 where nothing is predicted.
    """
    if cluster.step_base_s is None or cluster.step_token_s is None or cluster.remaining_tokens is None:
        return np.zeros(len(cluster.location))
    full = cluster.step_base_s + cluster.step_token_s * cluster.capacity_tokens
    least, slo_infeasible = running.slack(cluster.remaining_tokens, full[cluster.location])
    slack = np.where(running.gap_missed, np.inf, np.where(slo_infeasible, running.gap_s, least))
    return np.where(np.isnan(slack), 0.0, slack)


def _index_of_most_slack(slack: FloatArray, cluster: Cluster, rows: IntArray) -> int:
    """Return the index of the most slack; of equals, bounded by their gap, of the one with the largest memory-time."""
    tied = np.flatnonzero(slack == slack.max())
    if cluster.remaining_tokens is None or not np.isfinite(slack.max()):
        return int(tied[0])
    middle = cluster.remaining_tokens[rows[tied], len(cluster.levels) // 2]
    size = memory_time(cluster.resident_tokens[rows[tied]].astype(np.float64), np.where(np.isnan(middle), 0.0, middle))
    return int(tied[np.argmax(size)])
