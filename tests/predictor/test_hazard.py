import math

import numpy as np
import pytest
import torch

from ares.predictor import hazard, metrics


def test_edges_begin_with_single_tokens_and_end_behind_the_limit() -> None:
    grid = hazard.edges(1024)
    assert grid[:3].tolist() == [1, 2, 3]
    assert grid[-1] == 1025
    assert (grid.diff() > 0).all()


@pytest.mark.parametrize("limit", [1, 2, 5, 40, 100_000])
def test_edges_of_any_limit(limit: int) -> None:
    grid = hazard.edges(limit)
    assert grid[0] == 1
    assert grid[-1] == limit + 1
    assert (grid.diff() > 0).all()


def test_likelihood_by_hand() -> None:
    grid = torch.tensor([1.0, 2.0, 4.0, 8.0])
    logits = torch.logit(torch.tensor([[0.5, 0.2, 0.4]]))

    def of(remaining: int, censored: bool) -> float:
        value = hazard.log_likelihood(logits, grid, torch.tensor([remaining]), torch.tensor([censored]))
        return math.exp(float(value))

    assert of(1, False) == pytest.approx(0.5)
    assert of(3, False) == pytest.approx(0.5 * 0.2)
    assert of(5, False) == pytest.approx(0.5 * 0.8 * 0.4)
    # Outlived one token; then a quarter of the last bin's four tokens (4 of 4, 5, 6, 7).
    assert of(1, True) == pytest.approx(0.5, rel=1e-4)
    assert of(4, True) == pytest.approx(0.5 * 0.8 * (1 - 0.4 / 4), rel=1e-4)
    assert of(7, True) == pytest.approx(0.5 * 0.8 * 0.6, rel=1e-4)
    assert of(100, True) == pytest.approx(0.5 * 0.8 * 0.6, rel=1e-4)


def _fit(remaining: torch.Tensor, censored: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    logits = torch.zeros(1, len(grid) - 1, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(120):
        optimizer.zero_grad()
        many = logits.expand(len(remaining), -1)
        (-hazard.log_likelihood(many, grid, remaining, censored).mean()).backward()
        optimizer.step()
    return logits.detach()


def test_a_known_hazard_is_found_through_censoring() -> None:
    """Half of the outputs are cut: taken as ends they would halve the lengths, left out they would shorten them."""
    generator = np.random.default_rng(0)
    true = generator.geometric(1 / 60, 5000)
    cut = generator.integers(1, 100, 5000)
    remaining, censored = torch.from_numpy(np.minimum(true, cut)), torch.from_numpy(true > cut)
    assert 0.3 < censored.float().mean() < 0.7
    grid = hazard.edges(100, 20)
    logits = _fit(remaining, censored, grid)
    quantiles = hazard.quantiles(hazard.cumulative(logits), grid, torch.tensor([0.25, 0.5, 0.75]))
    expected = [math.log(1 - level) / math.log(1 - 1 / 60) for level in (0.25, 0.5, 0.75)]
    # The last one lies where hardly anything was seen.
    assert quantiles[0].tolist() == pytest.approx(expected, rel=0.08)


def test_quantiles_behind_the_last_edge_go_on_with_its_hazard() -> None:
    grid = torch.tensor([1.0, 11.0, 21.0])
    keep = 0.9**10
    ended = hazard.cumulative(torch.logit(torch.tensor([[1 - keep, 1 - keep]])))
    quantile = hazard.quantiles(ended, grid, torch.tensor([0.99]))
    assert float(quantile) == pytest.approx(1 + math.log(0.01) / math.log(0.9), rel=0.01)


def test_calibrated_where_the_law_is_known() -> None:
    generator = np.random.default_rng(1)
    remaining = generator.geometric(1 / 40, 4000)
    grid = hazard.edges(200)
    logits = _fit(torch.from_numpy(remaining), torch.zeros(4000, dtype=torch.bool), grid)
    fresh = generator.geometric(1 / 40, 4000).astype(float)
    levels = torch.tensor(hazard.LEVELS)
    quantiles = hazard.quantiles(hazard.cumulative(logits), grid, levels).numpy().astype(float).repeat(4000, 0)
    for level in (0.5, 0.9):
        assert metrics.covered(quantiles, fresh, level).mean() == pytest.approx(level, abs=0.025)
