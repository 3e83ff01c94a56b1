"""Residual life: what finished outputs say about those that still run."""

import random

import numpy as np
import pytest

from ares.gateway.control.lengths import LengthHistory


def test_quantiles_of_what_followed() -> None:
    history = LengthHistory()
    source = random.Random(1)
    lengths = [source.randint(1, 1000) for _ in range(1500)]
    for length in lengths:
        history.add(length)
    for generated in (0, 100, 500):
        longer = np.array([length - generated for length in lengths if length > generated])
        expected = np.quantile(longer, [0.1, 0.5, 0.9])
        assert history.remaining(generated) == pytest.approx(expected, rel=0.05)


def test_only_the_newest_count() -> None:
    history = LengthHistory()
    for length in [5] * 3000 + [700] * 2000:
        history.add(length)
    assert history.remaining(0) == (700, 700, 700)


def test_who_has_outlasted_all_is_expected_to_go_on_as_long_again() -> None:
    history = LengthHistory()
    for _ in range(100):
        history.add(50)
    low, middle, high = history.remaining(4000)
    assert 0 < low < middle < 4000 < high
    assert LengthHistory().remaining(0)[1] == pytest.approx(256 * np.log(2))
