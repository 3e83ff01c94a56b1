"""Out-of-memory avoidance written with whole arrays: what its compiled loops (oom_avoidance_loops.py) must decide."""

import numpy as np

from ares.policy import Cluster
from ares.policy.admission import Progress, memory_time
from ares.policy.admission.forecast import GRID
from ares.policy.admission.loop import choose_instance
from ares.policy.cluster import FloatArray, IntArray
from ares.policy.forecast import own_curve, plain_forecast, quantile_weights
from ares.policy.oom_avoidance import NO_TARGET, OomAction, OomAvoidanceSettings
from ares.policy.oom_avoidance_loops import FURTHEST


def lookahead_steps(cluster: Cluster, lookahead_s: float) -> IntArray:
    """Return how many steps each instance makes in `lookahead_s` seconds, at most `FURTHEST`, shape (I,).

    50 a second where the step time is unknown.
    """
    if cluster.step_base_s is None or cluster.step_request_s is None or cluster.step_token_s is None:
        return np.full(len(cluster.instances), int(min(np.ceil(lookahead_s * 50.0), FURTHEST)))
    batch = np.bincount(cluster.location, minlength=len(cluster.instances))
    step_s = cluster.step_base_s + cluster.step_request_s * batch + cluster.step_token_s * cluster.load_tokens()
    steps: IntArray = np.minimum(np.ceil(lookahead_s / np.maximum(step_s, 1e-4)), FURTHEST).astype(np.int64)
    return steps


def avoid_oom(cluster: Cluster, settings: OomAvoidanceSettings, running: Progress) -> list[OomAction]:
    """Return the actions of one period, at most one per instance, the one that lacks most tokens first.

    Parameters
    ----------
    cluster
        The decode pool.
    settings
        What must fit, and for how long.
    running
        Progress of its requests, R elements.
    """
    if not len(cluster.location):
        return []
    steps = lookahead_steps(cluster, settings.lookahead_s)
    # Most of the time there is room everywhere, which a few points of the horizon tell.
    soon = np.unique(np.concatenate([np.zeros(1, np.int64), steps]))
    allocated = plain_forecast(cluster, soon).allocated[np.arange(len(steps)), np.searchsorted(soon, steps)]
    overflow = allocated - cluster.capacity_tokens
    if not (overflow > 0.0).any():
        return []
    ahead = plain_forecast(cluster, GRID)
    expected, variance = ahead.allocated.copy(), ahead.variance.copy()
    sources = [int(s) for s in np.argsort(-overflow, kind="stable") if overflow[s] > 0.0]
    closed = (~cluster.open).astype(np.int64)
    closed[sources] = 1
    capacity = cluster.capacity_tokens.astype(np.int64)
    weights = quantile_weights(cluster.levels)
    slack: FloatArray | None = None
    oom_actions: list[OomAction] = []
    for source in sources:
        enough = _enough(cluster, source, int(steps[source]), float(overflow[source]))
        if not len(enough):
            continue
        row = int(enough[0])
        remaining = np.full(len(weights), np.inf)
        if cluster.remaining_tokens is not None:
            remaining = np.nan_to_num(cluster.remaining_tokens[row], nan=np.inf)
        mean, spread = np.zeros(len(GRID)), np.zeros(len(GRID))
        resident = float(cluster.resident_tokens[row])
        own_curve(resident, remaining, weights, GRID.astype(np.float64), cluster.block_tokens, mean, spread)
        points = max(1, int(np.searchsorted(GRID, min(float(remaining[-1]), settings.horizon), side="left")))
        nothing = (np.zeros(0, np.int64), 0.0)  # of no request is it known what is cached
        limits = (points, settings.deviations, settings.headroom)
        target = choose_instance(expected, variance, capacity, closed, *nothing, mean, spread, *limits)
        lack = f"{cluster.instances[source]} lacks {overflow[source]:.0f} of {cluster.capacity_tokens[source]} tokens"
        if target >= 0:
            expected[target] += mean
            variance[target] += spread
            reason = f"{lack} in {steps[source]} steps; {resident:.0f} tokens fit {cluster.instances[target]}"
        else:
            slack = _slack_s(cluster, running) if slack is None else slack
            row = int(enough[_index_of_most_slack(slack[enough], cluster, enough)])
            idle = f"no request fits elsewhere; this one can be suspended for {slack[row]:.1f} s"
            reason = f"{lack} in {steps[source]} steps; {idle}"
        oom_actions.append(OomAction(row, source, target if target >= 0 else NO_TARGET, reason))
    return oom_actions


def _enough(cluster: Cluster, source: int, steps: int, overflow: float) -> IntArray:
    """Return the movable requests that each make enough room, the smallest first; where none does, the largest.

    One that is likely to end before then is not worth its move.
    """
    movable = cluster.movable if cluster.commanded is None else cluster.movable | cluster.commanded
    movable = movable & (cluster.location == source)
    if cluster.remaining_tokens is not None:
        middle = cluster.remaining_tokens[:, len(cluster.levels) // 2]
        movable = movable & ~(middle <= steps)
    rows = np.flatnonzero(movable)
    if not len(rows) or np.count_nonzero(cluster.location == source) < 2:
        return rows[:0]
    relief = cluster.resident_tokens[rows] + steps
    enough = relief >= overflow
    if enough.any():
        chosen: IntArray = rows[enough][np.argsort(relief[enough], kind="stable")]
        return chosen
    return rows[[np.argmax(relief)]]


def _slack_s(cluster: Cluster, running: Progress) -> FloatArray:
    """Return the seconds for which each request may be suspended, shape (R,); infinite where its gap is missed."""
    if cluster.step_base_s is None or cluster.step_token_s is None or cluster.remaining_tokens is None:
        return np.zeros(len(cluster.location))
    full = cluster.step_base_s + cluster.step_token_s * cluster.capacity_tokens
    least, slo_infeasible = running.slack(cluster.remaining_tokens, full[cluster.location])
    slack = np.where(running.gap_missed, np.inf, np.where(slo_infeasible, running.gap_s, least))
    return np.where(np.isnan(slack), 0.0, slack)


def _index_of_most_slack(slack: FloatArray, cluster: Cluster, rows: IntArray) -> int:
    """Return the index of the most slack; of equals, bounded by their gap, of the one with the largest memory-time."""
    best = [index for index in range(len(rows)) if slack[index] == slack.max()]
    if cluster.remaining_tokens is None or np.isinf(slack.max()):
        return best[0]
    middle = cluster.remaining_tokens[rows, len(cluster.levels) // 2]
    sizes = memory_time(cluster.resident_tokens[rows].astype(np.float64), np.where(np.isnan(middle), 0.0, middle))
    return max(best, key=lambda index: (sizes[index], -index))
