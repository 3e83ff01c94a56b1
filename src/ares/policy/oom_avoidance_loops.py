"""The inner loop of oom_avoidance.py: which request leaving each instance that runs out of memory, and where to.

Plain loops over arrays, compiled where numba is installed. Importing this module imports numba.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ares.policy.admission.loop import choose_instance, own_curve
from ares.policy.compiling import compiled, inlined

F8 = NDArray[np.float64]
I8 = NDArray[np.int64]
B1 = NDArray[np.bool_]

FURTHEST = 1 << 20
"""Steps ahead, at most: the forecast keeps a table of them."""


class Rows(NamedTuple):
    """Running requests: instance, resident tokens, whether each may leave, shape (R,); quantiles, shape (R, Q)."""

    location: I8
    resident: I8
    movable: B1
    remaining: F8


@compiled
def lookahead_steps(
    location: I8, resident: I8, promised: I8, cost_model: tuple[F8, F8, F8], lookahead_s: float, steps: I8
) -> None:
    """Write how many steps each instance makes in `lookahead_s` seconds, at most `FURTHEST`, shape (I,).

    Parameters
    ----------
    location, resident
        Instance and resident tokens of each row, shape (R,).
    promised
        Tokens promised to each instance, shape (I,).
    cost_model
        Base, request and token of a decode step, seconds, shape (I,) each.
    """
    batch, tokens = np.zeros(len(steps), np.int64), promised.copy()
    for row in range(len(location)):
        batch[location[row]] += 1
        tokens[location[row]] += resident[row]
    base, request, token = cost_model
    for instance in range(len(steps)):
        step_s = base[instance] + request[instance] * batch[instance] + token[instance] * tokens[instance]
        steps[instance] = int(min(np.ceil(lookahead_s / max(step_s, 1e-4)), FURTHEST))


@compiled
def near_limit(
    location: I8, resident: I8, promised: I8, capacity: I8, steps: I8, block: int, rows: I8
) -> tuple[I8, I8]:
    """Return the instances that may run out of memory within their steps even where no request ends.

    Parameters
    ----------
    location, resident
        Instance and resident tokens of each row, shape (R,).
    promised, capacity, steps
        Tokens promised, KV tokens, and steps ahead of each instance, shape (I,).
    block
        Tokens of a KV block.
    rows
        Room for R indices.

    Returns
    -------
    Which instances, and which rows are theirs.
    """
    most = promised + 1  # against rounding
    for row in range(len(location)):
        instance = location[row]
        most[instance] += resident[row] + steps[instance] + block
    near = np.flatnonzero(most > capacity)
    count = 0
    if len(near) > 0:
        for row in range(len(location)):
            if most[location[row]] > capacity[location[row]]:
                rows[count] = row
                count += 1
    return near, rows[:count]


@compiled
def find_candidates(rows: tuple[I8, I8, B1, F8], sources: I8, steps: I8, overflow: F8, bounds: I8) -> I8:
    """Return the requests that alone make enough room at their source by leaving, sorted by size per source.

    Where none is enough, the largest one. A request that is likely to end before then is not worth its move, and the
    only request of an instance stays.

    Parameters
    ----------
    rows
        The fields of `Rows`: a plain tuple is handed over faster.
    sources
        Instances that run out of memory, shape (S,).
    steps, overflow
        Steps ahead, and the tokens that the instance lacks then, shape (I,).
    bounds
        The result, shape (S, 2): start and end of each source's candidates.
    """
    running = Rows(*rows)
    candidates, starts = _collect_candidates(running, sources, steps)
    for place in range(len(sources)):
        source, start = sources[place], starts[place]
        bounds[place, 0] = start
        bounds[place, 1] = _sort_sufficient(
            running, candidates, start, starts[place + 1], steps[source], overflow[source]
        )
    return candidates


@compiled
def choose_targets(
    rows: tuple[I8, I8, B1, F8],
    leaving: I8,
    capacity: I8,
    closed: I8,
    curves: tuple[F8, F8],
    horizon: tuple[F8, F8],
    block: int,
    furthest: int,
    deviations: float,
    headroom: float,
    targets: I8,
) -> None:
    """Choose the instance that takes each request that leaves, or -1 where it fits nowrunning.

    Parameters
    ----------
    rows
        The fields of `Rows`.
    leaving
        Requests, in the order in which they are placed, shape (L,).
    capacity, closed
        KV tokens of each instance, and 1 for instances that take no requests, shape (I,).
    curves
        Forecast of the tokens of each instance and its variance, shape (I, K) each; updated with each
        request that enters.
    horizon
        Steps ahead of those curves, shape (K,), and the probability of each quantile, shape (Q,).
    block
        Tokens of a KV block.
    furthest
        Steps ahead, at most, for which a request must fit.
    deviations, headroom
        As in `OomAvoidanceSettings`.
    targets
        The result, shape (L,).
    """
    running = Rows(*rows)
    expected, variance = curves
    grid, weights = horizon
    mean, spread = np.empty(len(grid)), np.empty(len(grid))
    nothing = np.zeros(0, np.int64)
    for index in range(len(leaving)):
        row = leaving[index]
        mean[:], spread[:] = 0.0, 0.0
        own_curve(float(running.resident[row]), running.remaining[row], weights, grid, block, mean, spread)
        until = np.fmin(
            running.remaining[row, len(weights) - 1], furthest
        )  # NaN, without a prediction: as far as allowed
        points = 1
        while points < len(grid) and grid[points] < until:
            points += 1
        target = choose_instance(
            expected, variance, capacity, closed, nothing, 0.0, mean, spread, points, deviations, headroom
        )
        targets[index] = target
        if target >= 0:
            for point in range(len(grid)):
                expected[target, point] += mean[point]
                variance[target, point] += spread[point]


@inlined
def _collect_candidates(running: Rows, sources: I8, steps: I8) -> tuple[I8, I8]:
    """Return the requests that may leave each source, in the order of the sources, and where those of each begin."""
    middle = running.remaining.shape[1] // 2
    position = np.full(len(steps), -1)
    for place in range(len(sources)):
        position[sources[place]] = place
    batch, count = np.zeros(len(sources), np.int64), np.zeros(len(sources), np.int64)
    found = np.empty(len(running.location), np.int64)
    total = 0
    for row in range(len(running.location)):
        place = position[running.location[row]]
        if place >= 0:
            batch[place] += 1
            if running.movable[row] and not running.remaining[row, middle] <= steps[running.location[row]]:
                found[total] = row
                total += 1
                count[place] += 1
    starts = np.zeros(len(sources) + 1, np.int64)
    for place in range(len(sources)):
        starts[place + 1] = starts[place] + (count[place] if batch[place] > 1 else 0)
    candidates, following = np.empty(starts[len(sources)], np.int64), starts.copy()
    for row in found[:total]:
        place = position[running.location[row]]
        if batch[place] > 1:
            candidates[following[place]] = row
            following[place] += 1
    return candidates, starts


@inlined
def _sort_sufficient(running: Rows, candidates: I8, start: int, end: int, steps: int, overflow: float) -> int:
    """Move the requests that each make enough room to the front of `start` to `end`, sorted; return their end."""
    largest, kept = start, start
    for place in range(start, end):
        row = candidates[place]
        if running.resident[row] > running.resident[candidates[largest]]:
            largest = place
        if running.resident[row] + steps >= overflow:
            at = kept
            while at > start and running.resident[candidates[at - 1]] > running.resident[row]:
                candidates[at] = candidates[at - 1]
                at -= 1
            candidates[at] = row
            kept += 1
    if kept == start and end > start:
        candidates[start] = candidates[largest]
        return start + 1
    return kept


def prepare() -> None:
    """Compile what the first decision would otherwise wait for: some seconds, or load it from the cache."""
    none, no_rows, empty = np.zeros(0), np.zeros(0, np.int64), np.zeros((0, 1))
    lookahead_steps(no_rows, no_rows, no_rows, (none, none, none), 1.0, no_rows)
    near_limit(no_rows, no_rows, no_rows, no_rows, no_rows, 1, no_rows)
    rows = (no_rows, no_rows, np.zeros(0, np.bool_), empty)
    find_candidates(rows, no_rows, no_rows, none, np.zeros((0, 2), np.int64))
    choose_targets(rows, no_rows, no_rows, no_rows, (empty, empty), (none, np.ones(1)), 1, 1, 1.0, 0.0, no_rows)
