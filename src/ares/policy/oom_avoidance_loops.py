"""The inner loop of rescue (rescue.py): which request leaves each instance that runs out of memory, and where to.

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
    """The running requests: instance, resident tokens and whether each may leave, shape (R,), quantiles, (R, Q)."""

    location: I8
    resident: I8
    able: B1
    remaining: F8


@compiled
def lead_steps(
    location: I8, resident: I8, promised: I8, cost_model: tuple[F8, F8, F8], lead_s: float, steps: I8
) -> None:
    """Write how many steps each instance makes in so many seconds, never more than a million, shape (I,).

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
        steps[instance] = int(min(np.ceil(lead_s / max(step_s, 1e-4)), FURTHEST))


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
    most = promised + 1  # for what rounding may add
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
def find_leavers(rows: tuple[I8, I8, B1, F8], sources: I8, steps: I8, overflow: F8, bounds: I8) -> I8:
    """Return the requests of which one is enough to help a source, those of a source the smallest first.

    Where none is enough, the largest there is. One that is likely to end by itself before is not worth its move, and
    one that is alone stays.

    Parameters
    ----------
    rows
        The fields of `Rows`: a plain tuple is handed over faster.
    sources
        Instances that run out of memory, shape (S,).
    steps, overflow
        Steps ahead, and the tokens that are lacking then, shape (I,).
    bounds
        The result, shape (S, 2): where those of a source begin and end.
    """
    here = Rows(*rows)
    leavers, starts = _leavers(here, sources, steps)
    for place in range(len(sources)):
        source, start = sources[place], starts[place]
        bounds[place, 0] = start
        bounds[place, 1] = _enough(here, leavers, start, starts[place + 1], steps[source], overflow[source])
    return leavers


@compiled
def choose_targets(
    rows: tuple[I8, I8, B1, F8],
    leaves: I8,
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
    """Choose the instance that takes each request that leaves, or -1 where it fits nowhere.

    Parameters
    ----------
    rows
        The fields of `Rows`.
    leaves
        Requests, in the order in which they are placed, shape (L,).
    capacity, closed
        KV tokens of each instance, and 1 where nothing enters, shape (I,).
    curves
        Forecast of the tokens of each instance and its variance, shape (I, K) each; what enters is added.
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
    here = Rows(*rows)
    expected, variance = curves
    grid, weights = horizon
    mean, spread = np.empty(len(grid)), np.empty(len(grid))
    for index in range(len(leaves)):
        row = leaves[index]
        mean[:], spread[:] = 0.0, 0.0
        own_curve(float(here.resident[row]), here.remaining[row], weights, grid, block, mean, spread)
        until = np.fmin(here.remaining[row, len(weights) - 1], furthest)  # NaN, one without a prediction, goes on
        points = 1
        while points < len(grid) and grid[points] < until:
            points += 1
        target = choose_instance(expected, variance, capacity, closed, mean, spread, points, deviations, headroom)
        targets[index] = target
        if target >= 0:
            expected[target] += mean
            variance[target] += spread


@inlined
def _leavers(here: Rows, sources: I8, steps: I8) -> tuple[I8, I8]:
    """Return the requests that may leave each source, in the order of the sources, and where those of each begin."""
    middle = here.remaining.shape[1] // 2
    position = np.full(len(steps), -1)
    position[sources] = np.arange(len(sources))
    batch, count = np.zeros(len(sources), np.int64), np.zeros(len(sources), np.int64)
    found = np.empty(len(here.location), np.int64)
    every = 0
    for row in range(len(here.location)):
        place = position[here.location[row]]
        if place >= 0:
            batch[place] += 1
            if here.able[row] and not here.remaining[row, middle] <= steps[here.location[row]]:
                found[every] = row
                every += 1
                count[place] += 1
    starts = np.zeros(len(sources) + 1, np.int64)
    for place in range(len(sources)):
        starts[place + 1] = starts[place] + (count[place] if batch[place] > 1 else 0)
    leavers, following = np.empty(starts[len(sources)], np.int64), starts.copy()
    for row in found[:every]:
        place = position[here.location[row]]
        if batch[place] > 1:
            leavers[following[place]] = row
            following[place] += 1
    return leavers, starts


@inlined
def _enough(here: Rows, leavers: I8, start: int, end: int, steps: int, overflow: float) -> int:
    """Put first, among those from `start` to `end`, the requests of which one is enough; return their end."""
    most, kept = start, start
    for place in range(start, end):
        row = leavers[place]
        if here.resident[row] > here.resident[leavers[most]]:
            most = place
        if here.resident[row] + steps >= overflow:
            at = kept
            while at > start and here.resident[leavers[at - 1]] > here.resident[row]:
                leavers[at] = leavers[at - 1]
                at -= 1
            leavers[at] = row
            kept += 1
    if kept == start and end > start:
        leavers[start] = leavers[most]
        return start + 1
    return kept


def prepare() -> None:
    """Compile now what the first decision would otherwise wait for: some seconds, or nothing from the cache."""
    none, nobody, empty = np.zeros(0), np.zeros(0, np.int64), np.zeros((0, 1))
    lead_steps(nobody, nobody, nobody, (none, none, none), 1.0, nobody)
    near_limit(nobody, nobody, nobody, nobody, nobody, 1, nobody)
    rows = (nobody, nobody, np.zeros(0, np.bool_), empty)
    find_leavers(rows, nobody, nobody, none, np.zeros((0, 2), np.int64))
    choose_targets(rows, nobody, nobody, nobody, (empty, empty), (none, np.ones(1)), 1, 1, 1.0, 0.0, nobody)
