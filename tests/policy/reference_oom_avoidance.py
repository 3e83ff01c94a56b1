"""The rule of rescue written with whole arrays: what its compiled loops (relief.py) must decide."""

import numpy as np

from ares.policy import Cluster
from ares.policy.admission import Progress, memory_time
from ares.policy.admission.forecast import GRID
from ares.policy.admission.loop import choose_instance
from ares.policy.cluster import FloatArray, IntArray
from ares.policy.forecast import own_curve, plain_forecast, quantile_weights
from ares.policy.oom_avoidance import NO_TARGET, OomAction, OomAvoidanceSettings
from ares.policy.oom_avoidance_loops import FURTHEST


def lead_steps(cluster: Cluster, lead_s: float) -> IntArray:
    """Return how many steps each instance makes in so many seconds, shape (I,); 50 a second where no law is known.

    Never more than a million.
    """
    if cluster.step_base_s is None or cluster.step_request_s is None or cluster.step_token_s is None:
        return np.full(len(cluster.instances), int(min(np.ceil(lead_s * 50.0), FURTHEST)))
    batch = np.bincount(cluster.location, minlength=len(cluster.instances))
    step_s = cluster.step_base_s + cluster.step_request_s * batch + cluster.step_token_s * cluster.load_tokens()
    steps: IntArray = np.minimum(np.ceil(lead_s / np.maximum(step_s, 1e-4)), FURTHEST).astype(np.int64)
    return steps


def avoid_oom(cluster: Cluster, settings: OomAvoidanceSettings, running: Progress) -> list[OomAction]:
    """Return the rescues of one period, at most one an instance, the direst first.

    Parameters
    ----------
    cluster
        The decode pool.
    settings
        The knobs.
    running
        How its requests stand, R elements.
    """
    if not len(cluster.location):
        return []
    steps = lead_steps(cluster, settings.lead_s)
    # Most of the time there is room everywhere, which a few points of the horizon tell.
    soon = np.unique(np.concatenate([np.zeros(1, np.int64), steps]))
    held = plain_forecast(cluster, soon).held[np.arange(len(steps)), np.searchsorted(soon, steps)]
    overflow = held - cluster.capacity_tokens
    if not (overflow > 0.0).any():
        return []
    ahead = plain_forecast(cluster, GRID)
    expected, variance = ahead.held.copy(), ahead.variance.copy()
    sources = [int(s) for s in np.argsort(-overflow, kind="stable") if overflow[s] > 0.0]
    closed = (~cluster.open).astype(np.int64)
    closed[sources] = 1
    capacity = cluster.capacity_tokens.astype(np.int64)
    weights = quantile_weights(cluster.levels)
    spare: FloatArray | None = None
    rescues: list[OomAction] = []
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
        target = choose_instance(
            expected, variance, capacity, closed, mean, spread, points, settings.deviations, settings.headroom
        )
        lack = f"{cluster.instances[source]} lacks {overflow[source]:.0f} of {cluster.capacity_tokens[source]} tokens"
        if target >= 0:
            expected[target] += mean
            variance[target] += spread
            reason = f"{lack} in {steps[source]} steps; {resident:.0f} tokens fit {cluster.instances[target]}"
        else:
            spare = _spare_s(cluster, running) if spare is None else spare
            row = int(enough[_most(spare[enough], cluster, enough)])
            reason = f"{lack} in {steps[source]} steps; what fits nowhere else can stand still for {spare[row]:.1f} s"
        rescues.append(OomAction(row, source, target if target >= 0 else NO_TARGET, reason))
    return rescues


def _enough(cluster: Cluster, source: int, steps: int, overflow: float) -> IntArray:
    """Return the movable requests of which one is enough, the smallest first; where none is, the largest there is.

    One that is likely to end by itself before is not worth its move.
    """
    able = cluster.movable if cluster.placed is None else cluster.movable | cluster.placed
    able = able & (cluster.location == source)
    if cluster.remaining_tokens is not None:
        middle = cluster.remaining_tokens[:, len(cluster.levels) // 2]
        able = able & ~(middle <= steps)
    rows = np.flatnonzero(able)
    if not len(rows) or np.count_nonzero(cluster.location == source) < 2:
        return rows[:0]
    relief = cluster.resident_tokens[rows] + steps
    enough = relief >= overflow
    if enough.any():
        chosen: IntArray = rows[enough][np.argsort(relief[enough], kind="stable")]
        return chosen
    return rows[[np.argmax(relief)]]


def _spare_s(cluster: Cluster, running: Progress) -> FloatArray:
    """Return the seconds that each request may stand still, shape (R,): one that misses its objective anyway, any."""
    if cluster.step_base_s is None or cluster.step_token_s is None or cluster.remaining_tokens is None:
        return np.zeros(len(cluster.location))
    full = cluster.step_base_s + cluster.step_token_s * cluster.capacity_tokens
    least, dead = running.spare(cluster.remaining_tokens, full[cluster.location])
    return np.where(running.silent, np.inf, np.where(dead, running.gap_s, least))


def _most(spare: FloatArray, cluster: Cluster, rows: IntArray) -> int:
    """Return the index of the most time to spare; of several whose gap bounds it, of the one that makes most room."""
    best = [index for index in range(len(rows)) if spare[index] == spare.max()]
    if cluster.remaining_tokens is None or np.isinf(spare.max()):
        return best[0]
    middle = cluster.remaining_tokens[rows, len(cluster.levels) // 2]
    sizes = memory_time(cluster.resident_tokens[rows].astype(np.float64), middle)
    return max(best, key=lambda index: (sizes[index], -index))
