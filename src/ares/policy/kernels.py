"""The pass over the rows that makes a forecast, as plain loops, compiled where numba is installed.

Numpy needs a dozen passes and as many temporary arrays for it, which took most of a decision's time; `forecast.py` does
that where numba is not installed. Both give the same bits: every sum is one of whole numbers below 2^53, or is taken in
the same order. Importing this module imports numba.
"""

import numpy as np
from numpy.typing import NDArray

from ares.policy.compiling import compiled, inlined

F8 = NDArray[np.float64]
I8 = NDArray[np.int64]
I2 = NDArray[np.int16]


@compiled
def forecast_rows(
    location: I8,
    resident: I8,
    remaining: F8,
    promised: I8,
    weights: F8,
    changes: F8,
    table: I2,
    steps: F8,
    block: int,
    expected: F8,
    allocated: F8,
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
        Probability of each quantile, and by how much S (1 - S) falls there, shape (Q,).
    table
        First grid point at or past each whole step, one past the last where there is none.
    steps
        The grid, shape (K,).
    block
        Tokens of a KV block; 1 counts single tokens.
    expected, allocated, variance, count
        Results, shape (I, K): `allocated` is `expected` in whole blocks.
    """
    points = len(steps)
    order = _by_instance(location, len(promised))
    # Sums of 1, n and n^2 by (quantile, first grid point past it), and room to add up those of one quantile.
    cells = np.empty((len(weights), points + 1, 3))
    sums = np.empty((6, points))
    # Rows by their tokens in the next step, modulo the block, and how far each grid point is from a block's end.
    offsets, unused, to_block_end = np.empty(block), np.empty(block + 1), np.empty(points, np.int64)
    for point in range(points):
        to_block_end[point] = block - int(steps[point]) % block
    place = 0
    for instance in range(len(promised)):
        place = _sum_rows(
            instance, place, location, order, resident, remaining, table, steps[points - 1] + 1.0, cells, offsets
        )
        mean, total = expected[instance], count[instance]
        _over_the_horizon(
            cells, weights, changes, steps, float(promised[instance]), sums, mean, total, variance[instance]
        )
        for point in range(points):
            allocated[instance, point] = mean[point]
        if block > 1:
            rows = max(_sum_unused(offsets, unused), 1.0)
            for point in range(points):
                allocated[instance, point] += unused[to_block_end[point]] * (total[point] / rows)


@inlined
def _by_instance(location: I8, instances: int) -> I8:
    """Return the rows sorted by instance, so that its sums stay in the cache; empty where they are sorted already.

    A counting sort: numba's `argsort` takes seconds to compile.
    """
    is_sorted = True
    for row in range(1, len(location)):
        is_sorted = is_sorted and location[row - 1] <= location[row]
    order = np.empty(0 if is_sorted else len(location), np.int64)
    if is_sorted:
        return order
    following = np.zeros(instances + 1, np.int64)  # place of the next row of each instance
    for row in range(len(location)):
        following[location[row] + 1] += 1
    for instance in range(instances):
        following[instance + 1] += following[instance]
    for row in range(len(location)):
        order[following[location[row]]] = row
        following[location[row]] += 1
    return order


@inlined
def _sum_rows(
    instance: int,
    place: int,
    location: I8,
    order: I8,
    resident: I8,
    remaining: F8,
    table: I2,
    beyond: float,
    cells: F8,
    offsets: F8,
) -> int:
    """Sum the rows of an instance into its cells; return the place of the next instance's first row."""
    block = len(offsets)
    mask = block - 1 if block & (block - 1) == 0 else 0  # the residue of a power of two needs no division
    cells[:] = 0.0
    offsets[:] = 0.0
    while place < len(location):
        row = order[place] if len(order) > 0 else place
        if location[row] != instance:
            break
        place += 1
        tokens = float(resident[row])
        square = tokens * tokens
        if tokens > 0.0:
            after = resident[row] + 1
            offsets[after & mask if mask > 0 else after % block] += 1.0
        for quantile in range(cells.shape[0]):
            end = remaining[row, quantile]
            if not end < beyond:  # NaN too
                end = beyond
            point = table[max(int(end + 0.999999), 0)]
            cells[quantile, point, 0] += 1.0
            cells[quantile, point, 1] += tokens
            cells[quantile, point, 2] += square
    return place


@inlined
def _over_the_horizon(
    cells: F8, weights: F8, changes: F8, steps: F8, promised: float, sums: F8, mean: F8, total: F8, variance: F8
) -> None:
    """Add up the cells of all quantiles past each point; `mean`, `total` and `variance` have shape (K,)."""
    points = len(steps)
    mean[:] = 0.0
    total[:] = 0.0
    sums[3:] = 0.0
    for quantile in range(len(weights)):
        rows, linear, squares = 0.0, 0.0, 0.0
        for point in range(points - 1, -1, -1):
            rows += cells[quantile, point + 1, 0]
            linear += cells[quantile, point + 1, 1]
            squares += cells[quantile, point + 1, 2]
            sums[0, point], sums[1, point], sums[2, point] = rows, linear, squares
        weight, change = weights[quantile], changes[quantile]
        for point in range(points):
            total[point] += weight * sums[0, point]
            mean[point] += weight * sums[1, point]
        if abs(change) > 1e-12:
            for point in range(points):
                sums[3, point] += change * sums[0, point]
                sums[4, point] += change * sums[1, point]
                sums[5, point] += change * sums[2, point]
    for point in range(points):
        step = steps[point]
        mean[point] = mean[point] + step * total[point] + promised
        variance[point] = max(sums[5, point] + step * (2.0 * sums[4, point] + step * sums[3, point]), 0.0)


@inlined
def _sum_unused(offsets: F8, unused: F8) -> float:
    """Write the unused tokens of all rows' last blocks, by how far a point is from a block's end; return the rows.

    A row of residue r has its last block filled up by cut - r tokens more, or by as many and a block.
    """
    block = len(offsets)
    every, summed = 0.0, 0.0
    for residue in range(block):
        every += offsets[residue]
        summed += residue * offsets[residue]
    fewer, sum_fewer = 0.0, 0.0
    for cut in range(1, block + 1):
        fewer += offsets[cut - 1]
        sum_fewer += (cut - 1) * offsets[cut - 1]
        unused[cut] = every + fewer * cut - sum_fewer
        if cut == block:
            unused[cut] -= offsets[0] * block
        else:
            later, sum_later = every - fewer - offsets[cut], summed - sum_fewer - cut * offsets[cut]
            unused[cut] += later * (cut + block) - sum_later
    return every
