"""The innermost loops of a decision, as plain as they can be written, compiled where numba is installed.

Numpy needs a dozen passes and as many temporary arrays for the forecast's sums over the rows, and most of a decision's
time. Without numba `forecast.py` does just that; both give the same bits, because every sum is one of whole numbers
below 2^53 or is taken in the same order. The closer look at one move runs as Python where there is no numba.
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
    table: I2,
    steps: F8,
    expected: F8,
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
    expected, variance, count
        Results, shape (I, K).
    """
    instances, points, atoms = len(promised), len(steps), len(weights)
    # Sums of 1, n and n^2 by (instance, atom, grid point at which the atom ends).
    cells = np.zeros((instances, atoms, points + 1, 3))
    beyond = steps[points - 1] + 1.0
    for row in range(len(location)):
        tokens = float(resident[row])
        of_instance = cells[location[row]]
        for atom in range(atoms):
            end = remaining[row, atom]
            if not end < beyond:  # NaN too
                end = beyond
            cell = of_instance[atom, table[max(int(end + 0.999999), 0)]]
            cell[0] += 1.0
            cell[1] += tokens
            cell[2] += tokens * tokens
    rows, linear, square = np.empty(atoms), np.empty(atoms), np.empty(atoms)
    for instance in range(instances):
        of_instance = cells[instance]
        rows[:] = 0.0
        linear[:] = 0.0
        square[:] = 0.0
        for point in range(points - 1, -1, -1):
            alive, tokens, spread0, spread1, spread2 = 0.0, 0.0, 0.0, 0.0, 0.0
            for atom in range(atoms):
                cell = of_instance[atom, point + 1]
                rows[atom] += cell[0]
                linear[atom] += cell[1]
                square[atom] += cell[2]
                alive += weights[atom] * rows[atom]
                tokens += weights[atom] * linear[atom]
                if abs(changes[atom]) > 1e-12:
                    spread0 += changes[atom] * rows[atom]
                    spread1 += changes[atom] * linear[atom]
                    spread2 += changes[atom] * square[atom]
            step = steps[point]
            count[instance, point] = alive
            expected[instance, point] = tokens + step * alive + promised[instance]
            variance[instance, point] = max(spread2 + step * (2.0 * spread1 + step * spread0), 0.0)


def pair_look(
    resident: float,
    left: F8,
    weights: F8,
    steps: F8,
    beta: F8,
    source: tuple[float, float],
    target: tuple[float, float],
    source_time: F8,
    target_time: F8,
    source_excess: F8,
    target_expected: F8,
    target_variance: F8,
    deviations: float,
) -> tuple[float, float, float, float, float]:
    """Look at one move on every point of the horizon; `balance.py` says what the terms mean.

    Parameters
    ----------
    resident, left
        Resident tokens of the request, and its quantiles, NaN or infinite where it outlasts the horizon, shape (Q,).
    weights
        Probability of each quantile, shape (Q,).
    steps, beta
        The horizon and the weights of its points, shape (K,).
    source, target
        Step time a request and a token of either instance.
    source_time, target_time
        Load of either instance, shape (K,).
    source_excess
        Forecast memory of the source beyond its limit, shape (K,).
    target_expected, target_variance
        Forecast memory of the target, shape (K,).
    deviations
        Standard deviations above the expectation that count as safe.

    Returns
    -------
    tuple
        Fall of the sum of squared loads; fall of the squared excess; peak of the target's memory; what the source
        loses and the target gains of its mean load.
    """
    change, memory, peak, leaves, enters = 0.0, 0.0, -np.inf, 0.0, 0.0
    for point in range(len(steps)):
        alive = 0.0
        for atom in range(len(weights)):
            if not left[atom] <= steps[point]:  # NaN outlasts every step
                alive += weights[atom]
        reach = resident + steps[point]
        tokens = alive * reach
        spread = np.sqrt(target_variance[point] + tokens * (reach - tokens))
        peak = max(peak, target_expected[point] + tokens + deviations * spread)
        less = source[0] * alive + source[1] * tokens
        more = target[0] * alive + target[1] * tokens
        relief = (2.0 * source_time[point] - less) * less - (2.0 * target_time[point] + more) * more
        excess = source_excess[point]
        rest = max(excess - tokens, 0.0)
        change += relief * beta[point]
        memory += (excess * excess - rest * rest) * beta[point]
        leaves += less * beta[point]
        enters += more * beta[point]
    return change, memory, peak, leaves, enters


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
    """Compile now what the first decision would otherwise wait for: seconds, or milliseconds from the cache."""
    rows, look, curve = compiled(forecast_rows), compiled(pair_look), compiled(row_curves)
    if rows is None or look is None or curve is None:
        return
    none, one, table, curves = np.zeros(0, np.int64), np.zeros(1), np.zeros(3, np.int16), np.zeros((0, 1))
    rows(none, none, curves, none, one, one, table, one, curves, curves, curves)
    curve(none, none, curves, one, one, curves, curves)
    look(1.0, one, one, one, one, (0.0, 1.0), (0.0, 1.0), one, one, one, one, one, 1.0)
