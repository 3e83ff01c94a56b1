"""The forecast: how many tokens each instance will hold, k steps ahead.

A running request of n resident tokens that has p steps left holds n + k tokens in k steps while k < p, and none after.
p is not known; a predictor gives quantiles of it, taken here as equally informative atoms with weights. With S(k) the
probability that p > k, the request holds S(k) (n + k) tokens in expectation, with variance S(k) (1 - S(k)) (n + k)^2.
Requests end independently of each other, so the expectations and the variances of an instance's requests add up, and
expectation + z standard deviations is a high quantile of its memory (a sum of many terms is close to normal).

A request without a prediction is taken to outlast the horizon.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ares.policy.cluster import Cluster

FloatArray = NDArray[np.float64]


def geometric_grid(horizon: int, points: int) -> NDArray[np.int64]:
    """Steps ahead at which load is forecast: 0, then geometric up to the horizon, no step twice.

    Fewer than `points` are returned where rounding makes neighbours equal.
    """
    if horizon <= 0:
        return np.zeros(1, np.int64)
    spread = np.geomspace(1.0, horizon, max(points - 1, 1)).round().astype(np.int64)
    return np.unique(np.concatenate([np.zeros(1, np.int64), spread]))


def quantile_weights(levels: tuple[float, ...]) -> FloatArray:
    """Weights of quantiles taken as atoms: each stands for the probability that is nearest to its level, shape (Q,)."""
    edges = [0.0, *((a + b) / 2.0 for a, b in zip(levels, levels[1:], strict=False)), 1.0]
    return np.diff(np.asarray(edges))


@dataclass(frozen=True, slots=True)
class Forecast:
    """Load of every instance over the horizon.

    Attributes
    ----------
    grid
        Steps ahead, shape (K,).
    expected
        Expected resident tokens, promised ones included, shape (I, K).
    variance
        Their variance, shape (I, K).
    count
        Expected number of running requests, shape (I, K).
    """

    grid: NDArray[np.int64]
    expected: FloatArray
    variance: FloatArray
    count: FloatArray

    def high(self, deviations: float) -> FloatArray:
        """Return a high quantile of resident tokens: expectation + deviations x standard deviation, shape (I, K)."""
        return self.expected + deviations * np.sqrt(np.maximum(self.variance, 0.0))


def forecast(cluster: Cluster, grid: NDArray[np.int64]) -> Forecast:
    """Forecast the load of every instance.

    Each atom of each row falls into the interval of the grid in which it ends. Sums of 1, n and n^2 by (instance,
    interval) are enough: a cumulative sum from the far end gives every point of the horizon, so the cost is one pass
    over the rows and does not grow with the grid.

    Parameters
    ----------
    cluster
        R rows on I instances, with or without predictions.
    grid
        Steps ahead, increasing from 0, shape (K,).
    """
    instances, points = len(cluster.instances), len(grid)
    width = points + 1
    cells = instances * width
    resident = cluster.resident_tokens.astype(np.float64)
    remaining = cluster.remaining_tokens
    weights = quantile_weights(cluster.levels)
    if remaining is None or len(weights) == 0:
        remaining = np.full((len(resident), 1), np.inf, np.float64)
        weights = np.ones(1)
    base = cluster.location * width

    def tails(values: FloatArray | None, keys: NDArray[np.int64]) -> FloatArray:
        """Sum values over the rows that still run at each grid point, shape (I, K)."""
        cell = np.bincount(keys, weights=values, minlength=cells).reshape(instances, width)
        return np.cumsum(cell[:, ::-1], axis=1)[:, ::-1][:, 1:]

    steps = grid.astype(np.float64)
    zero: FloatArray = np.zeros((instances, points))
    count, first, spread0, spread1, spread2 = zero, zero, zero, zero, zero
    # In the order of the atoms, S falls by one weight at each: S (1 - S) therefore changes by a known amount there.
    survival = 1.0
    for atom, weight in enumerate(weights):
        # grid[interval - 1] < p <= grid[interval]: the row runs at the grid points before `interval`.
        interval = _interval(remaining[:, atom], grid)
        keys = base + interval
        ones, linear = tails(None, keys), tails(resident, keys)
        count = count + weight * ones
        first = first + weight * linear
        after = survival - weight
        change = survival * (1.0 - survival) - after * (1.0 - after)
        if abs(change) > 1e-12:
            square = tails(resident * resident, keys)
            spread0, spread1, spread2 = spread0 + change * ones, spread1 + change * linear, spread2 + change * square
        survival = after
    expected = first + steps * count + cluster.promised_tokens[:, None]
    # Var = sum over rows of S (1 - S) (n + k)^2; `change` accumulates S (1 - S) from the right of each atom.
    variance = spread2 + 2.0 * steps * spread1 + steps * steps * spread0
    return Forecast(grid, expected, np.maximum(variance, 0.0), count)


def _interval(remaining: NDArray[np.floating], grid: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the first grid point that is at or past the end of each row; the grid's length where none is."""
    horizon = int(grid[-1])
    # A table over whole steps is several times faster than a binary search for each row.
    table = np.searchsorted(grid, np.arange(horizon + 2), side="left")
    ends = np.minimum(np.nan_to_num(remaining, nan=np.inf), horizon + 1)
    return table[np.maximum(np.ceil(ends), 0.0).astype(np.int64)]


def own_curve(
    resident: float, remaining: FloatArray, weights: FloatArray, grid: FloatArray, mean: FloatArray, variance: FloatArray
) -> None:
    """Add one request's expectation and variance over the grid to two arrays, shape (K,), in place.

    Plain loops over a few points: the simulator compiles this function as it stands.
    """
    for point in range(len(grid)):
        alive = 0.0
        for atom in range(len(weights)):
            if remaining[atom] > grid[point]:
                alive += weights[atom]
        tokens = resident + grid[point]
        mean[point] += alive * tokens
        variance[point] += alive * (1.0 - alive) * tokens * tokens
