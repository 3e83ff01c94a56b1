"""Online cost models: right where the data says enough, sane where it does not."""

import numpy as np
import pytest

from ares.policy.cost_model import OnlineLeastSquares


def test_it_finds_the_coefficients_through_noise() -> None:
    random, fit = np.random.default_rng(1), OnlineLeastSquares(3)
    for _ in range(2000):
        batch = float(random.integers(1, 64))
        tokens = batch * float(random.uniform(50, 900))
        fit.add(np.array([1.0, batch, tokens]), (0.02 + 3e-4 * batch + 2e-7 * tokens) * float(random.normal(1, 0.05)))
    found = fit.coefficients
    assert found is not None
    for batch, tokens in ((1, 100), (32, 10_000), (64, 50_000)):
        truth = 0.02 + 3e-4 * batch + 2e-7 * tokens
        assert found @ np.array([1.0, batch, tokens]) == pytest.approx(truth, rel=0.03)


def test_it_follows_a_change() -> None:
    fit = OnlineLeastSquares(1, forgetting=0.9, minimum=1)
    for value in [1.0] * 100 + [2.0] * 100:
        fit.add(np.array([1.0]), value)
    assert fit.coefficients == pytest.approx([2.0], rel=0.01)


def test_nothing_is_negative_and_what_is_never_seen_is_zero() -> None:
    fit = OnlineLeastSquares(3, minimum=5)
    for batch in range(1, 30):  # falls with the batch: no cost model of ours does
        fit.add(np.array([1.0, float(batch), 0.0]), 1.0 / batch)
    found = fit.coefficients
    assert found is not None
    assert (found >= 0).all()
    assert found[1] == found[2] == 0.0


def test_too_little_and_nonsense_give_no_coefficients() -> None:
    fit = OnlineLeastSquares(2, minimum=3)
    fit.add(np.array([1.0, 2.0]), 1.0)
    for x, y in ((np.nan, 1.0), (1.0, np.inf), (1.0, 0.0), (1.0, -1.0)):
        fit.add(np.array([1.0, x]), y)
    assert fit.coefficients is None
