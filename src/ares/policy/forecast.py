"""The forecast: how many tokens each instance will hold, k steps ahead.

A running request of n resident tokens that has p steps left holds n + k tokens in k steps while k < p, then none.
p is not known; a predictor gives quantiles of it, each standing for the probability nearest to its level. With S(k) the
probability that p > k, the request holds S(k) (n + k) tokens in expectation, with variance S(k) (1 - S(k)) (n + k)^2.
Requests end independently of each other, so the expectations and the variances of an instance's requests add up, and
expectation + z standard deviations is a high quantile of its memory (a sum of many terms is close to normal).

A request without a prediction is taken to outlast the horizon.

Memory is taken in whole blocks of b tokens: a request holds b ceil((n + k + 1) / b), the token to be computed included.
The unused part of the last blocks is counted exactly, from how many requests begin a block at which step (a histogram
of n + 1 modulo b), times the share of the requests that still run.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ares.policy.cluster import Cluster
from ares.policy.compiling import compiles

FloatArray = NDArray[np.float64]


@lru_cache(maxsize=8)
def geometric_grid(horizon: int, points: int) -> NDArray[np.int64]:
    """Return the steps ahead at which load is forecast: 0, then geometric up to the horizon, no step twice.

    The first ones are 0, 1, 2, ...: whole steps. Fewer than `points` are returned for a shorter horizon.
    """
    if horizon <= 0:
        return np.zeros(1, np.int64)
    spread = np.geomspace(1.0, horizon, max(points - 1, 1)).round().astype(np.int64)
    spread = np.minimum(np.maximum(spread, np.arange(1, len(spread) + 1)), horizon)
    return np.unique(np.concatenate([np.zeros(1, np.int64), spread]))


@lru_cache(maxsize=8)
def quantile_weights(levels: tuple[float, ...]) -> FloatArray:
    """Return the weight of each quantile, shape (Q,): the probability nearest to its level."""
    edges = [0.0, *((a + b) / 2.0 for a, b in pairwise(levels)), 1.0]
    return np.diff(np.asarray(edges))


@dataclass(frozen=True, slots=True)
class Forecast:
    """Load of every instance over the horizon.

    Attributes
    ----------
    grid
        Steps ahead, shape (K,).
    expected
        Expected resident tokens, promised ones included, shape (I, K): what a step attends to.
    allocated
        The same in whole blocks, shape (I, K): what occupies memory.
    variance
        Their variance, shape (I, K).
    count
        Expected number of running requests, shape (I, K).
    """

    grid: NDArray[np.int64]
    expected: FloatArray
    allocated: FloatArray
    variance: FloatArray
    count: FloatArray

    def high(self, deviations: float) -> FloatArray:
        """Return a high quantile of memory: expectation + deviations x standard deviation, in tokens, shape (I, K)."""
        spread: FloatArray = np.sqrt(np.maximum(self.variance, 0.0))
        return self.allocated + deviations * spread


def forecast(cluster: Cluster, grid: NDArray[np.int64]) -> Forecast:
    """Forecast the load of every instance.

    Each quantile of each row falls into one interval of the grid. Sums of 1, n and n^2 by (instance,
    interval) are enough: a cumulative sum from the far end gives every point of the horizon, so the cost is one pass
    over the rows and does not grow with the grid. That pass is compiled where numba is installed (kernels.py).

    Parameters
    ----------
    cluster
        R rows on I instances, with or without predictions.
    grid
        Steps ahead, increasing from 0, shape (K,).
    """
    if not compiles():
        return plain_forecast(cluster, grid)
    from ares.policy.kernels import forecast_rows  # imports numba: only where it is needed

    remaining, levels = cluster.remaining_or_infinite()
    shape = (len(cluster.instances), len(grid))
    made = Forecast(grid, *(np.empty(shape) for _ in range(4)))
    forecast_rows(
        np.ascontiguousarray(cluster.location, np.int64),
        np.ascontiguousarray(cluster.resident_tokens, np.int64),
        np.ascontiguousarray(remaining, np.float64),
        np.ascontiguousarray(cluster.promised_tokens, np.int64),
        quantile_weights(levels),
        _variance_steps(levels),
        intervals(grid.tobytes()),
        grid.astype(np.float64),
        cluster.block_tokens,
        made.expected,
        made.allocated,
        made.variance,
        made.count,
    )
    return made


def prepare_forecast() -> None:
    """Compile the pass over the rows, or take it from the cache."""
    if compiles():
        from ares.policy.kernels import forecast_rows

        none, one, empty = np.zeros(0, np.int64), np.zeros(1), np.zeros((0, 1))
        forecast_rows(none, none, empty, none, one, one, np.zeros(3, np.int16), one, 1, empty, empty, empty, empty)


@lru_cache(maxsize=8)
def _variance_steps(levels: tuple[float, ...]) -> FloatArray:
    """Return by how much S (1 - S) falls at each quantile, shape (Q,)."""
    weights = quantile_weights(levels)
    changes = np.empty(len(weights))
    survival_variance_steps(weights, changes)
    return changes


def survival_variance_steps(weights: FloatArray, changes: FloatArray) -> None:
    """Write by how much S (1 - S) falls at each quantile, shape (Q,); the simulator compiles this function."""
    survival = 1.0
    for quantile in range(len(weights)):
        after = survival - weights[quantile]
        changes[quantile] = survival * (1.0 - survival) - after * (1.0 - after)
        survival = after


def plain_forecast(cluster: Cluster, grid: NDArray[np.int64]) -> Forecast:
    """Forecast in numpy alone; the same bits as `forecast`."""
    instances, points = len(cluster.instances), len(grid)
    width = points + 1
    cells = instances * width
    resident = cluster.resident_tokens.astype(np.float64)
    remaining, levels = cluster.remaining_or_infinite()
    weights, changes = quantile_weights(levels), _variance_steps(levels)
    base = cluster.location * width
    # Two sums in one pass: resident tokens in the high bits of a double, the count of rows in the low ones.
    packed = resident * _PACK + 1.0
    square = resident * resident
    table = intervals(grid.tobytes())

    def tails(values: FloatArray, keys: NDArray[np.int64]) -> FloatArray:
        """Sum values over the rows that still run at each grid point, shape (I, K)."""
        cell = np.bincount(keys, weights=values, minlength=cells).reshape(instances, width)
        return cell[:, :0:-1].cumsum(axis=1)[:, ::-1]

    # A row runs at the grid points before the first one at or past its end. NaN: at all of them.
    ends = np.empty((len(weights), len(resident)))
    np.fmin(remaining.T, grid[-1] + 1.0, out=ends)
    ends += 0.999999
    keys = table.take(ends.astype(np.int64), mode="clip").astype(np.int64)
    keys += base
    steps = grid.astype(np.float64)
    count, linear = np.zeros((instances, points)), np.zeros((instances, points))
    spread0, spread1, spread2 = np.zeros_like(count), np.zeros_like(count), np.zeros_like(count)
    for quantile, (weight, change) in enumerate(zip(weights, changes, strict=True)):
        both = tails(packed, keys[quantile])
        tokens = np.floor(both * (1.0 / _PACK))
        rows = both - tokens * _PACK
        count += weight * rows
        linear += weight * tokens
        if abs(change) > 1e-12:
            spread0 += change * rows
            spread1 += change * tokens
            spread2 += change * tails(square, keys[quantile])
    linear += steps * count
    linear += cluster.promised_tokens[:, None]
    allocated = linear + _unused_tokens(cluster, grid, count) if cluster.block_tokens > 1 else linear
    variance = spread2 + steps * (2.0 * spread1 + steps * spread0)
    return Forecast(grid, linear, allocated, np.maximum(variance, 0.0), count)


def _unused_tokens(cluster: Cluster, grid: NDArray[np.int64], count: FloatArray) -> FloatArray:
    """Return the tokens by which the blocks of an instance's requests exceed their tokens, shape (I, K)."""
    size = cluster.block_tokens
    holds = cluster.resident_tokens > 0
    rows = np.bincount(cluster.location[holds], minlength=len(cluster.instances))[:, None]
    # Unused tokens of each row's last block, the next token included, at every grid point.
    after = (cluster.resident_tokens[holds, None] + 1 + grid) % size
    rest = 1 + (size - after) % size
    total = np.zeros((len(cluster.instances), len(grid)), np.int64)
    np.add.at(total, cluster.location[holds], rest)
    share: FloatArray = count / np.maximum(rows, 1)
    return total * share


_PACK = float(1 << 20)


@lru_cache(maxsize=8)
def intervals(points: bytes) -> NDArray[np.int16]:
    """Index of the first grid point at or past each whole step; a table beats a binary search for every row."""
    grid = np.frombuffer(points, np.int64)
    return np.searchsorted(grid, np.arange(int(grid[-1]) + 3), side="left").astype(np.int16)


def own_curve(
    resident: float,
    remaining: FloatArray,
    weights: FloatArray,
    grid: FloatArray,
    block: int,
    mean: FloatArray,
    variance: FloatArray,
) -> None:
    """Add one request's expectation and variance over the grid to two arrays, shape (K,), in place.

    Plain loops over a few points, which admission/loop.py compiles; `block` as in `Cluster.block_tokens`.
    """
    for point in range(len(grid)):
        alive = 0.0
        for quantile in range(len(weights)):
            if not remaining[quantile] <= grid[point]:  # NaN outlasts every step
                alive += weights[quantile]
        tokens = resident + grid[point]
        if block > 1:  # the block of the next token is allocated before the step
            tokens = math.ceil((tokens + 1.0) / block) * float(block)
        mean[point] += alive * tokens
        variance[point] += alive * (1.0 - alive) * tokens * tokens
