"""The one-pass forecast equals the sum over rows that its definition asks for."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ares.policy import Cluster, forecast
from ares.policy.forecast import geometric_grid, own_curve, plain_forecast, quantile_weights


def make(instances: int, location: list[int], resident: list[int], remaining: np.ndarray | None) -> Cluster:
    rows = len(location)
    return Cluster(
        instances=tuple(f"i{index}" for index in range(instances)),
        capacity_tokens=np.full(instances, 10**6, np.int64),
        promised_tokens=np.arange(instances, dtype=np.int64) * 100,
        open=np.ones(instances, np.bool_),
        requests=tuple(f"r{index}" for index in range(rows)),
        location=np.asarray(location, np.int64),
        resident_tokens=np.asarray(resident, np.int64),
        movable=np.ones(rows, np.bool_),
        remaining_tokens=remaining,
    )


rows_strategy = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(1, 40_000),
        st.lists(st.integers(0, 9000) | st.just(-1), min_size=3, max_size=3).map(sorted),
    ),
    max_size=30,
)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5000)), max_size=30), st.sampled_from([2, 16, 128]))
def test_memory_is_taken_in_whole_blocks(rows: list[tuple[int, int]], block: int) -> None:
    """Exactly: what runs on needs the blocks of its tokens and the next one, at every step."""
    grid = geometric_grid(600, 40)
    cluster = replace(make(4, [row[0] for row in rows], [row[1] for row in rows], None), block_tokens=block)
    expected = np.tile(cluster.promised_tokens[:, None].astype(float), (1, len(grid)))
    for where, resident in rows:
        expected[where] += -(-(resident + grid + 1) // block) * block if resident else grid
    for got in (forecast(cluster, grid), plain_forecast(cluster, grid)):
        crowded = np.array([all(r for w, r in rows if w == n) for n in range(4)])  # rows without KV count as alive
        np.testing.assert_allclose(got.allocated[crowded], expected[crowded], rtol=1e-12)


@given(rows_strategy, st.sampled_from([(0, 64), (50, 8), (4000, 64), (8000, 16)]))
def test_equals_the_definition(rows: list[tuple[int, int, list[int]]], shape: tuple[int, int]) -> None:
    grid = geometric_grid(*shape)
    remaining = np.array([[np.nan if q < 0 else float(q) for q in row[2]] for row in rows]).reshape(len(rows), 3)
    remaining[np.isnan(remaining).any(axis=1)] = np.nan
    cluster = make(4, [row[0] for row in rows], [row[1] for row in rows], remaining)
    got = forecast(cluster, grid)
    weights = quantile_weights(cluster.levels)
    expected = np.tile(cluster.promised_tokens[:, None].astype(float), (1, len(grid)))
    variance, count = np.zeros((4, len(grid))), np.zeros((4, len(grid)))
    for index, (where, resident, _) in enumerate(rows):
        for k, step in enumerate(grid):
            alive = sum(w for w, p in zip(weights, remaining[index], strict=True) if np.isnan(p) or p > step)
            expected[where, k] += alive * (resident + step)
            variance[where, k] += alive * (1 - alive) * (resident + step) ** 2
            count[where, k] += alive
    np.testing.assert_allclose(got.expected, expected, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(got.count, count, atol=1e-9)
    np.testing.assert_allclose(got.variance, variance, rtol=1e-9, atol=1.0)


@pytest.mark.parametrize("block", [1, 16])
def test_own_curve_is_the_forecast_of_one_row(block: int) -> None:
    grid = geometric_grid(2000, 16)
    remaining = np.array([[100.0, 400.0, 1500.0]])
    cluster = replace(make(1, [0], [777], remaining), block_tokens=block)
    mean, variance = np.zeros(len(grid)), np.zeros(len(grid))
    own_curve(777.0, remaining[0], quantile_weights(cluster.levels), grid.astype(float), block, mean, variance)
    got = forecast(cluster, grid)
    np.testing.assert_allclose(got.allocated[0], mean, atol=1e-6)
    np.testing.assert_allclose(got.variance[0], variance, rtol=1e-9 if block == 1 else 0.04, atol=1e-3)


def test_without_predictions_requests_grow_for_ever() -> None:
    grid = geometric_grid(1000, 10)
    got = forecast(make(2, [0, 0], [10, 20], None), grid)
    np.testing.assert_allclose(got.expected[0], 30 + 2 * grid)
    assert (got.variance == 0).all()


@pytest.mark.parametrize(("horizon", "points"), [(0, 64), (5, 64), (100, 64), (4000, 64), (16000, 8)])
def test_the_grid_increases_from_now_to_the_horizon(horizon: int, points: int) -> None:
    grid = geometric_grid(horizon, points)
    assert grid[0] == 0
    assert grid[-1] == horizon
    assert (np.diff(grid) > 0).all()
    assert len(grid) == min(points, horizon + 1)


def test_the_high_quantile_covers_the_truth() -> None:
    """Independent lengths drawn from the quantiles stay below expectation + 1.645 deviations about 95 % of the time."""
    random = np.random.default_rng(0)
    grid = geometric_grid(1000, 12)
    quantiles = np.sort(random.integers(1, 2000, (60, 3)), axis=1).astype(float)
    resident = random.integers(100, 3000, 60)
    cluster = make(1, [0] * 60, resident.tolist(), quantiles)
    high = forecast(cluster, grid).high(1.645)[0]
    weights = quantile_weights(cluster.levels)
    inside = 0
    for _ in range(2000):
        length = quantiles[np.arange(60), random.choice(3, 60, p=weights)]
        tokens = ((length[:, None] > grid) * (resident[:, None] + grid)).sum(axis=0)
        inside += int(tokens[-2] <= high[-2])
    assert 0.92 < inside / 2000 < 0.98
