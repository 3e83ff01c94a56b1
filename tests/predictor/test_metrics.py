from pathlib import Path

import numpy as np
import pytest

from ares.predictor import dataset, floor, metrics
from ares.predictor.hazard import LEVELS
from tests.predictor.synthetic import folder


def row(*values: float) -> np.ndarray:
    return np.array([values], float)


def test_median_and_error_by_hand() -> None:
    quantiles = np.array([np.arange(20.0), np.arange(20.0) * 10])
    assert metrics.at_level(quantiles, 0.5).tolist() == [9.5, 95.0]
    assert metrics.absolute_error(quantiles, np.array([10.0, 100.0])).tolist() == [0.5, 5.0]


def test_pinball_by_hand() -> None:
    quantiles = np.full((1, 20), 10.0)
    above = metrics.pinball(quantiles, np.array([14.0]))[0]
    below = metrics.pinball(quantiles, np.array([6.0]))[0]
    assert above == pytest.approx(4 * np.mean(LEVELS))
    assert below == pytest.approx(4 * (1 - np.mean(LEVELS)))
    # The CRPS of one number is its absolute error.
    assert 2 * above == pytest.approx(4.0)


def test_coverage_counts_the_limit_by_its_share() -> None:
    """Four fifths of the distribution below the limit: a calibrated forecast covers 90 % there, not 100."""
    quantiles = np.tile(np.concatenate([np.linspace(1, 16, 16), np.full(4, 100.0)]), (1000, 1))
    remaining = np.concatenate([np.linspace(0.5, 16.5, 800), np.full(200, 100.0)])
    room = np.full(1000, 100.0)
    assert metrics.covered(quantiles, remaining, 0.9).mean() == 1.0
    assert metrics.covered_fairly(quantiles, remaining, room, 0.9).mean() == pytest.approx(0.9, abs=0.01)


def test_kendall_by_hand() -> None:
    quantiles = np.tile(np.array([[1.0], [2.0], [3.0]]), (1, 20))
    assert metrics.tau(quantiles, np.array([1.0, 3.0, 2.0])) == pytest.approx(1 / 3)
    assert metrics.tau(np.ones((3, 20)), np.array([1.0, 3.0, 2.0])) == 0.0


def test_the_bootstrap_resamples_prompts_not_pairs() -> None:
    """A hundred copies of each of two values tell no more than two values."""
    values = np.repeat([0.0, 1.0], 100)
    assert metrics.Bootstrap(np.repeat([0, 1], 100)).interval(values) == [0.0, 1.0]


def test_rows_by_position() -> None:
    output = np.array([0, 0, 0, 1])
    rows = metrics.rows_by_position(output, np.array([0.0, 20, 40, 0]), np.array([50.0, 30, 10, 5]))
    assert rows[0.0].tolist() == [0, 3]
    assert rows[0.5].tolist() == [1, 3]
    assert rows[0.75].tolist() == [2, 3]


def test_floor_by_hand() -> None:
    found = floor.of_prefix([1, 2, 9])
    assert found["mae_in_sample"] == pytest.approx((1 + 0 + 7) / 3)
    assert found["mae_leave_one_out"] == pytest.approx((4.5 + 3 + 7.5) / 3)
    assert found["crps"] == pytest.approx((1 + 8 + 7) / 3 / 2)


def test_floor_is_near_the_truth_for_a_known_law() -> None:
    """Exponential lengths: E|Y - median| = mean x log 2, E|Y - Y'| / 2 = mean / 2."""
    generator = np.random.default_rng(0)
    rows = [floor.of_prefix(generator.exponential(100, 16)) for _ in range(2000)]
    mean = {name: np.mean([r[name] for r in rows]) for name in rows[0]}
    assert mean["mae_in_sample"] < 100 * np.log(2) < mean["mae_leave_one_out"]
    assert mean["mae"] == pytest.approx(100 * np.log(2), rel=0.02)
    assert mean["crps"] == pytest.approx(50, rel=0.03)


def test_reducible_error_by_hand() -> None:
    prefixes = [floor.Prefix("r", 0, 100, (10, 30))] * 2
    own, other = {"mae": np.array([14.0, 14.0]), "crps": np.array([12.0, 12.0])}, {}
    least = floor.of_prefix((10, 30))
    other = {"mae": np.array([24.0, 24.0]), "crps": np.array([20.0, 20.0])}
    found = floor.reducible(own, other, prefixes, np.array([0, 1]))
    assert found["mae"] == pytest.approx(10 / (24 - least["mae"]), abs=1e-3)
    assert found["crps"] == pytest.approx(8 / (20 - least["crps"]), abs=1e-3)


def test_a_floor_that_is_continued_draws_other_prefixes(tmp_path: Path) -> None:
    pairs = dataset.load(folder(tmp_path))

    def drawn(count: int, known: list[floor.Prefix]) -> list[floor.Prefix]:
        rows = floor.choose(pairs, count, known=known)
        assert pairs.split("test")[rows].all()
        return [floor.Prefix(pairs.requests[pairs.output[n]], int(pairs.position[n]), 9, (1, 2)) for n in rows]

    first = drawn(5, [])
    both = first + drawn(12, first)
    assert len({(p.request, p.position) for p in both}) == len(both) == 12
    assert drawn(12, both) == []
