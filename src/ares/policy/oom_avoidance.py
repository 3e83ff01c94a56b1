"""OomAction: an instance that is about to run out of memory gives a request away before it must preempt one.

The rebalancer spreads load and lets a few periods pass where a move gains little. Memory does not wait: when the
expected tokens of an instance exceed its capacity within the time that a move takes, the cheapest request that prevents
it is moved where it fits. Where it fits nowhere, the one with the most time to spare is suspended and resumes where
there is room, which costs a prefill as a preemption does, but not on the full instance, and not of the request that
vLLM would have picked.
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
    """The knobs of rescue.

    Attributes
    ----------
    lead_s
        Seconds ahead at which memory must still suffice: a decision period and a move.
    deviations
        Standard deviations above the expectation that must fit at the target.
    headroom
        Share of a target's KV that must stay free.
    horizon
        Steps ahead, at most, for which the request must fit the target: a move buys time, and is better than a pause.
    """

    lead_s: float = 2.0
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


def lead_steps(cluster: Cluster, lead_s: float) -> IntArray:
    """Return how many steps each instance makes in so many seconds, shape (I,); 50 a second where no law is known.

    Never more than a million.
    """
    from ares.policy.oom_avoidance_loops import FURTHEST
    from ares.policy.oom_avoidance_loops import lead_steps as write  # imports numba: only where it is needed

    steps = np.empty(len(cluster.instances), np.int64)
    if cluster.step_base_s is None or cluster.step_request_s is None or cluster.step_token_s is None:
        steps[:] = int(min(np.ceil(lead_s * 50.0), FURTHEST))
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
        lead_s,
        steps,
    )
    return steps


def avoid_oom(
    cluster: Cluster, settings: OomAvoidanceSettings, running: Progress | Callable[[], Progress]
) -> list[OomAction]:
    """Return the rescues of one period, at most one an instance, the direst first.

    Parameters
    ----------
    cluster
        The decode pool.
    settings
        The knobs.
    running
        How its requests stand, R elements, or what tells it: it is asked only where one must be suspended.
    """
    if not len(cluster.location):
        return []
    steps = lead_steps(cluster, settings.lead_s)
    overflow = _overflow(cluster, steps)
    sources = np.flatnonzero(overflow > 0.0)
    if not len(sources):
        return []
    return _relieve(cluster, settings, running, sources[np.argsort(-overflow[sources], kind="stable")], steps, overflow)


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
        held = forecast(part, soon).held[np.arange(len(near)), np.searchsorted(soon, steps[near])]
        overflow[near] = held - cluster.capacity_tokens[near]
    return overflow


def _relieve(
    cluster: Cluster,
    settings: OomAvoidanceSettings,
    running: Progress | Callable[[], Progress],
    sources: IntArray,
    steps: IntArray,
    overflow: FloatArray,
) -> list[OomAction]:
    """Choose who leaves each source, in this order, and where to, and say why."""
    from ares.policy.oom_avoidance_loops import choose_targets, find_leavers

    able = cluster.movable if cluster.placed is None else cluster.movable | cluster.placed
    remaining = cluster.remaining_tokens
    if remaining is None:
        remaining = np.full((len(cluster.location), len(cluster.levels)), np.inf)
    running_rows = (
        np.ascontiguousarray(cluster.location, np.int64),
        np.ascontiguousarray(cluster.resident_tokens, np.int64),
        np.ascontiguousarray(able, np.bool_),
        np.ascontiguousarray(remaining, np.float64),
    )
    bounds = np.empty((len(sources), 2), np.int64)
    leavers = find_leavers(running_rows, sources, steps, overflow, bounds)
    helped = np.flatnonzero(bounds[:, 0] < bounds[:, 1])
    if not len(helped):
        return []
    grid = GRID[: max(1, int(np.searchsorted(GRID, settings.horizon, side="left")))]
    ahead = forecast(cluster, grid)
    closed = (~cluster.open).astype(np.int64)
    closed[sources] = 1
    leaves, targets = leavers[bounds[helped, 0]], np.empty(len(helped), np.int64)
    choose_targets(
        running_rows,
        leaves,
        np.ascontiguousarray(cluster.capacity_tokens, np.int64),
        closed,
        (ahead.held, ahead.variance),
        (grid.astype(np.float64), quantile_weights(cluster.levels)),
        cluster.block_tokens,
        settings.horizon,
        settings.deviations,
        settings.headroom,
        targets,
    )
    spare: FloatArray | None = None
    rescues: list[OomAction] = []
    for place, row, target in zip(helped.tolist(), leaves.tolist(), targets.tolist(), strict=True):
        source = int(sources[place])
        lacks = f"{cluster.instances[source]} lacks {overflow[source]:.0f} of {cluster.capacity_tokens[source]} tokens"
        lack = f"{lacks} in {steps[source]} steps"
        if target >= 0:
            tokens = int(cluster.resident_tokens[row])
            rescues.append(OomAction(row, source, target, f"{lack}; {tokens} tokens fit {cluster.instances[target]}"))
            continue
        if spare is None:
            spare = _spare_s(cluster, running if isinstance(running, Progress) else running())
        enough = leavers[bounds[place, 0] : bounds[place, 1]]
        idle = int(enough[_most(spare[enough], cluster, enough)])
        reason = f"{lack}; what fits nowhere else can stand still for {spare[idle]:.1f} s"
        rescues.append(OomAction(idle, source, NO_TARGET, reason))
    return rescues


def prepare() -> None:
    """Compile the inner loops, for seconds, or take them from the cache."""
    from ares.policy import oom_avoidance_loops as relief  # imports numba: only where it is needed

    prepare_forecast()
    relief.prepare()


def exclude_conflicts(moves: list[MigrationDecision], rescues: list[OomAction]) -> list[MigrationDecision]:
    """Return the moves of a rebalancer that touch no request and no instance of a rescue."""
    ends = {one.source for one in rescues} | {one.target for one in rescues}
    return [move for move in moves if move.source not in ends and move.target not in ends]


def _spare_s(cluster: Cluster, running: Progress) -> FloatArray:
    """Return the seconds that each request may stand still, shape (R,): one that misses its objective anyway, any."""
    if cluster.step_base_s is None or cluster.step_token_s is None or cluster.remaining_tokens is None:
        return np.zeros(len(cluster.location))
    full = cluster.step_base_s + cluster.step_token_s * cluster.capacity_tokens
    least, dead = running.spare(cluster.remaining_tokens, full[cluster.location])
    return np.where(running.silent, np.inf, np.where(dead, running.gap_s, least))


def _most(spare: FloatArray, cluster: Cluster, rows: IntArray) -> int:
    """Return the index of the most time to spare; of several whose gap bounds it, of the one that makes most room."""
    best = spare == spare.max()
    if cluster.remaining_tokens is None or not np.isfinite(spare.max()):
        return int(np.argmax(best))
    middle = cluster.remaining_tokens[rows, len(cluster.levels) // 2]
    return int(np.argmax(np.where(best, memory_time(cluster.resident_tokens[rows].astype(np.float64), middle), -1.0)))
