"""Residual life: what outputs that have ended say about those that still run."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ares.policy import residual_life
from ares.policy.compiling import compiled

LEVELS = (0.1, 0.5, 0.9)


def by_counting(lengths: list[int], generated: int) -> list[float]:
    """Return the quantiles by the rule in its plainest form."""
    longer = sorted(length for length in lengths if length > generated)
    if len(longer) < 16:
        return [-max(256.0, generated) * math.log1p(-level) for level in LEVELS]
    return [float(longer[int(level * (len(longer) - 1))] - generated) for level in LEVELS]


@pytest.mark.parametrize("form", [cache(compiled), lambda function: function], ids=["compiled", "plain"])
@given(
    lengths=st.lists(st.integers(1, 40), max_size=120),
    places=st.integers(1, 50),
    generated=st.integers(0, 45),
)
def test_only_the_newest_that_went_on_for_longer_count(
    form: Callable[[Any], Callable[..., Any]], lengths: list[int], places: int, generated: int
) -> None:
    remember, expect = form(residual_life.remember), form(residual_life.expect)
    recent, sorted_lengths, got = np.zeros(places, np.int64), np.zeros(places, np.int64), np.empty(3)
    for ended, tokens in enumerate(lengths):
        remember(recent, sorted_lengths, ended, tokens)
        newest = lengths[max(0, ended + 1 - places) : ended + 1]
        assert sorted_lengths[: len(newest)].tolist() == sorted(newest)
    expect(sorted_lengths, len(lengths), generated, LEVELS, got)
    assert got.tolist() == by_counting(lengths[-places:], generated)


def test_the_prior_holds_until_sixteen_went_on_for_longer() -> None:
    recent, sorted_lengths, got = np.zeros(50, np.int64), np.zeros(50, np.int64), np.empty(3)
    for ended in range(16):
        residual_life.expect(sorted_lengths, ended, 100, LEVELS, got)
        assert got[1] == 256.0 * math.log(2.0)
        residual_life.remember(recent, sorted_lengths, ended, 101 + ended)
    residual_life.expect(sorted_lengths, 16, 100, LEVELS, got)
    assert got.tolist() == [2.0, 8.0, 14.0]
    residual_life.expect(sorted_lengths, 16, 4000, LEVELS, got)
    assert got[1] == pytest.approx(4000 * math.log(2.0)), "who has outlasted all goes on for as long again"
