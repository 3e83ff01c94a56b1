"""Quantiles cover what they say, once their levels are fitted; the laws are known here."""

import numpy as np
import pytest
import torch

from ares.predictor import calibration, hazard, metrics

LIMIT, COUNT = 200, 20_000
GRID = hazard.edges(LIMIT)


def drawn(rate: float) -> tuple[metrics.Array, metrics.Array]:
    """Return lengths that end with a chance of 1 / rate a token, cut by a room that differs, and the rooms."""
    generator = np.random.default_rng(0)
    room = generator.integers(20, LIMIT + 1, COUNT).astype(float)
    return np.minimum(generator.geometric(1 / rate, COUNT), room), room


def forecast(rate: float) -> torch.Tensor:
    """Return the same law for every pair."""
    return torch.from_numpy(1 - (1 - 1 / rate) ** (GRID.numpy() - 1)).float().expand(COUNT, -1)


@pytest.mark.parametrize("rate", [20.0, 40.0, 80.0])
def test_calibrated_levels_cover(rate: float) -> None:
    """Forecasts of 40 tokens are too long, right, and too short; their quantiles cover all the same."""
    remaining, room = drawn(rate)
    ended = forecast(40)
    levels = calibration.levels(*calibration.transform(ended, GRID, remaining, room))
    quantiles = metrics.bounded(hazard.quantiles(ended, GRID, levels).numpy().astype(float), room)
    for level in (0.25, 0.5, 0.75, 0.9):
        # The share of the limit is known to a twentieth (20 levels), the rest follows from that.
        assert metrics.covered_fairly(quantiles, remaining, room, level).mean() == pytest.approx(level, abs=0.04)


def test_what_is_calibrated_stays() -> None:
    remaining, room = drawn(40)
    levels = calibration.levels(*calibration.transform(forecast(40), GRID, remaining, room))
    assert levels.tolist() == pytest.approx(hazard.LEVELS, abs=0.01)
