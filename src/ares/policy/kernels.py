"""The innermost loops of a decision, as plain as they can be written, compiled where numba is installed.

Numpy needs a dozen passes and as many temporary arrays for the forecast's sums over the rows, and most of a decision's
time. Without numba `forecast.py` does just that; both give the same bits, because every sum is one of whole numbers
below 2^53 or is taken in the same order. The choice of moves runs as Python where there is no numba.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

F8 = NDArray[np.float64]
I8 = NDArray[np.int64]
I2 = NDArray[np.int16]


def forecast_rows(
    location: I8,
    resident: I8,
    remaining: F8,
    promised: I8,
    weights: F8,
    changes: F8,
    table: I2 | I8,
    steps: F8,
    block: int,
    expected: F8,
    held: F8,
    variance: F8,
    count: F8,
) -> None:
    """Write the forecast of every instance.

    Parameters
    ----------
    location, resident
        Instance and resident tokens of each row, shape (R,).
    remaining
        Quantiles of what is left, NaN or infinite where a row outlasts the horizon, shape (R, Q).
    promised
        Tokens promised to each instance, shape (I,).
    weights, changes
        Probability of each atom, and by how much S (1 - S) changes where it ends, shape (Q,).
    table
        First grid point at or past each whole step, one past the last where there is none.
    steps
        The grid, shape (K,).
    block
        Tokens of a KV block; 1 counts single tokens.
    expected, held, variance, count
        Results, shape (I, K): `held` is `expected` in whole blocks.
    """
    instances, points, atoms = len(promised), len(steps), len(weights)
    # Rows by instance, so that the sums of one fit the fastest cache: telemetry mostly gives them in that order.
    falls = 0
    for row in range(1, len(location)):
        falls += location[row] < location[row - 1]
    order = np.empty(0, np.int64) if falls == 0 else np.argsort(location)
    place = 0
    # Sums of 1, n and n^2 by (atom, grid point at which it ends), then over all atoms that still run at each point.
    cells = np.empty((atoms, 3, points + 1))
    tails = np.empty((3, points))
    spread = np.empty((3, points))
    # Rows by their tokens in the step to come, modulo the block; then all up to each residue, and their sum.
    residues = np.empty((2, block))
    beyond = steps[points - 1] + 1.0
    for instance in range(instances):
        cells[:] = 0.0
        residues[:] = 0.0
        while place < len(location):
            row = place if falls == 0 else order[place]
            if location[row] != instance:
                break
            place += 1
            tokens = float(resident[row])
            square = tokens * tokens
            if tokens > 0.0:
                residues[0, (resident[row] + 1) % block] += 1.0
            for atom in range(atoms):
                end = remaining[row, atom]
                if not end < beyond:  # NaN too
                    end = beyond
                point = table[max(int(end + 0.999999), 0)]
                cells[atom, 0, point] += 1.0
                cells[atom, 1, point] += tokens
                cells[atom, 2, point] += square
        spread[:] = 0.0
        count[instance] = 0.0
        expected[instance] = 0.0
        for atom in range(atoms):
            rows, linear, squares = 0.0, 0.0, 0.0
            for point in range(points - 1, -1, -1):
                rows += cells[atom, 0, point + 1]
                linear += cells[atom, 1, point + 1]
                squares += cells[atom, 2, point + 1]
                tails[0, point], tails[1, point], tails[2, point] = rows, linear, squares
            weight, change = weights[atom], changes[atom]
            for point in range(points):
                count[instance, point] += weight * tails[0, point]
                expected[instance, point] += weight * tails[1, point]
            if abs(change) > 1e-12:
                for point in range(points):
                    spread[0, point] += change * tails[0, point]
                    spread[1, point] += change * tails[1, point]
                    spread[2, point] += change * tails[2, point]
        own = float(promised[instance])
        for point in range(points):
            step = steps[point]
            expected[instance, point] = expected[instance, point] + step * count[instance, point] + own
            grown = spread[2, point] + step * (2.0 * spread[1, point] + step * spread[0, point])
            variance[instance, point] = max(grown, 0.0)
        held[instance] = expected[instance]
        if block > 1:
            for residue in range(1, block):
                residues[1, residue] = residues[1, residue - 1] + residue * residues[0, residue]
            first = residues[0, 0]
            for residue in range(1, block):
                residues[0, residue] += residues[0, residue - 1]
            every, summed = residues[0, block - 1], residues[1, block - 1]
            for point in range(points):
                # A row of residue r has its last block filled up by cut - r tokens more, or by as many and a block.
                cut = block - int(steps[point]) % block
                fewer, sum_fewer = residues[0, cut - 1], residues[1, cut - 1]
                rest = every + fewer * cut - sum_fewer
                if cut == block:
                    rest -= first * block
                else:
                    rest += (every - residues[0, cut]) * (cut + block) - (summed - residues[1, cut])
                held[instance, point] += rest * (count[instance, point] / max(every, 1.0))


def loads(
    expected: F8,
    held: F8,
    variance: F8,
    count: F8,
    law: tuple[F8, F8, F8],
    limit: F8,
    deviations: float,
    time: F8,
    excess: F8,
) -> None:
    """Write the step time of every instance ahead, and by how much a high quantile of its memory exceeds its limit.

    All but `law` (base, request and token, shape (I,) each) and `limit`, shape (I,), have shape (I, K).
    """
    for instance in range(len(limit)):
        base, request, token = law[0][instance], law[1][instance], law[2][instance]
        most = limit[instance]
        for point in range(expected.shape[1]):
            tokens = expected[instance, point]
            time[instance, point] = request * count[instance, point] + base + token * tokens
            high = np.sqrt(variance[instance, point]) * deviations + held[instance, point]
            excess[instance, point] = max(high - most, 0.0)


def take_pairs(
    gain: F8,
    best: F8,
    starts: I8,
    rows: I8,
    sources: I8,
    targets: I8,
    resident: I8,
    remaining: F8,
    weights: F8,
    steps: F8,
    beta: F8,
    law: F8,
    time: F8,
    excess: F8,
    held: F8,
    variance: F8,
    limit: F8,
    knobs: tuple[float, float, float, float],
    block: int,
    tries: int,
    pairs: I8,
    numbers: F8,
) -> int:
    """Take pairs greedily, best first, each looked at on every point of the horizon; return how many.

    One move leaves a source and one enters a target, and what received does not give, nor the other way round. A pair
    that gains too little, or takes the target beyond its limit, costs one of the `tries`. `balance.py` says what the
    terms mean.

    Parameters
    ----------
    gain
        Coarse score of each (row, target), overwritten where a pair is rejected, shape (C, T).
    best
        Its maximum over the rows of each source, overwritten, shape (G, T).
    starts
        First row of each source, and C, shape (G + 1,).
    rows, sources, targets
        Rows of the cluster, shape (C,), and instances, shape (G,) and (T,).
    resident, remaining, weights
        Resident tokens of all rows, shape (R,), their quantiles, (R, Q), and the probability of each, (Q,).
    steps, beta
        The horizon and the weights of its points, shape (K,).
    law
        Step time a request and a token of every instance, shape (I, 2).
    time, excess, held, variance, limit
        Load, memory beyond the limit, memory and its variance, shape (I, K), and the limit, shape (I,).
    knobs
        Mean load, deviations, memory weight, minimum gain.
    block
        Tokens of a KV block, in whole ones of which the target's memory is taken.
    tries
        How many rejected pairs end the search.
    pairs, numbers
        Results, shape (moves at most, 3) and (..., 4): row, source, target; gain, peak of the target's memory, what
        the source loses and the target gains of its mean load.
    """
    mean, deviations, memory_weight, minimum_gain = knobs
    taken = 0
    while taken < len(pairs) and tries > 0:
        group, column = 0, 0
        for g in range(best.shape[0]):
            for t in range(best.shape[1]):
                if best[g, t] > best[group, column]:
                    group, column = g, t
        if best[group, column] <= minimum_gain:
            break
        index = starts[group]
        for candidate in range(starts[group], starts[group + 1]):
            if gain[candidate, column] > gain[index, column]:
                index = candidate
        row, source, target = rows[index], sources[group], targets[column]
        change, memory, peak, leaves, enters = 0.0, 0.0, -np.inf, 0.0, 0.0
        for point in range(len(steps)):
            alive = 0.0
            for atom in range(len(weights)):
                if not remaining[row, atom] <= steps[point]:  # NaN outlasts every step
                    alive += weights[atom]
            reach = float(resident[row]) + steps[point]
            tokens = alive * reach
            spread = np.sqrt(variance[target, point] + tokens * (reach - tokens))
            own = np.ceil((reach + 1.0) / block) * block if block > 1 else reach
            peak = max(peak, held[target, point] + alive * own + deviations * spread)
            less = law[source, 0] * alive + law[source, 1] * tokens
            more = law[target, 0] * alive + law[target, 1] * tokens
            relief = (2.0 * time[source, point] - less) * less - (2.0 * time[target, point] + more) * more
            beyond = excess[source, point]
            rest = max(beyond - tokens, 0.0)
            change += relief * beta[point]
            memory += (beyond * beyond - rest * rest) * beta[point]
            leaves += less * beta[point]
            enters += more * beta[point]
        score = change / (mean * mean) + memory_weight * (memory / max(limit[source], 1.0) ** 2)
        if peak > limit[target] or score <= minimum_gain:
            tries -= 1
            gain[index, column] = -np.inf
            best[group, column] = gain[starts[group] : starts[group + 1], column].max()
            continue
        pairs[taken, 0], pairs[taken, 1], pairs[taken, 2] = row, source, target
        numbers[taken, 0], numbers[taken, 1] = score, peak
        numbers[taken, 2], numbers[taken, 3] = leaves, enters
        taken += 1
        for g in range(best.shape[0]):
            for t in range(best.shape[1]):
                if g == group or t == column or targets[t] == source or sources[g] == target:
                    best[g, t] = -np.inf
    return taken


def row_curves(rows: I8, resident: I8, remaining: F8, weights: F8, steps: F8, alive: F8, tokens: F8) -> None:
    """Write the probability to run and the expected tokens of some rows, shape (C, K) each.

    `rows` has shape (C,), `resident` (R,), `remaining` (R, Q), `weights` (Q,) and `steps` (K,).
    """
    for index in range(len(rows)):
        row = rows[index]
        for point in range(len(steps)):
            share = 0.0
            for atom in range(len(weights)):
                if not remaining[row, atom] <= steps[point]:  # NaN outlasts every step
                    share += weights[atom]
            alive[index, point] = share
            tokens[index, point] = share * (float(resident[row]) + steps[point])


Kernel = TypeVar("Kernel", bound=Callable[..., object])


@lru_cache(maxsize=8)
def compiled(function: Kernel) -> Kernel | None:
    """Compile a function of this file, or take it from numba's cache; None without numba."""
    try:
        import numba
    except ImportError:
        return None
    try:
        return cast(Kernel, numba.njit(cache=True)(function))
    except RuntimeError:  # nowhere to keep compiled code: a read-only installation without a home
        return cast(Kernel, numba.njit(function))


def prepare() -> None:
    """Do now what the first decision would otherwise wait for: compile, for seconds, or milliseconds from the cache."""
    # glibc gives every array above 128 KB back to the system until it has once freed a larger one; at 1,024 instances
    # half of a decision's time went into pages that came back as zeros. So free one of 16 MB, never touched.
    np.empty(1 << 21)
    rows, load, take, curve = compiled(forecast_rows), compiled(loads), compiled(take_pairs), compiled(row_curves)
    if rows is None or load is None or take is None or curve is None:
        return
    none, one, table = np.zeros(0, np.int64), np.zeros(1), np.zeros(3, np.int16)
    empty, matrix, pairs = np.zeros((0, 1)), np.zeros((1, 1)), np.zeros((0, 3), np.int64)
    rows(none, none, empty, none, one, one, table, one, 1, empty, empty, empty, empty)
    load(empty, empty, empty, empty, (one, one, one), one[:0], 1.0, empty, empty)
    curve(none, none, empty, one, one, empty, empty)
    take(
        matrix, matrix, none, none, none, none, none, empty, one, one, one, matrix, matrix, matrix, matrix, matrix, one,
        (1.0, 1.0, 1.0, 1.0), 1, 1, pairs, matrix,
    )  # fmt: skip
