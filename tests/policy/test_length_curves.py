"""Length curves: shrinkage, censoring, and quantiles that are always usable."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ares.policy import length_curves
from ares.policy.compiling import compiled
from ares.policy.length_curves import ALL, LAST, SHRINKAGE

LEVELS = (0.1, 0.5, 0.9)
FORMS = pytest.mark.parametrize("form", [cache(compiled), lambda function: function], ids=["compiled", "plain"])
Form = Callable[[Any], Callable[..., Any]]
BY_DEFAULT = cache(compiled)


def curve(cells: list[list[tuple[int, bool]]], form: Form = BY_DEFAULT) -> np.ndarray:
    """Return the curve of a request of cells with these outputs: lengths, and whether they were cut."""
    lengths, longer = length_curves.make(len(cells)), np.empty(len(LAST))
    for cell, outputs in enumerate(cells):
        for tokens, was_cut in outputs:
            form(length_curves.add)(lengths, cell, tokens, was_cut)
    form(length_curves.compose)(lengths, np.arange(len(cells)), longer)
    return longer


def quantiles(longer: np.ndarray, generated: int = 0, levels: tuple[float, ...] = LEVELS) -> list[float]:
    got = np.empty(len(levels))
    BY_DEFAULT(length_curves.expect)(longer, generated, levels, got)
    return list(got.tolist())


def share_longer(longer: np.ndarray, tokens: int) -> float:
    return float(longer[np.searchsorted(LAST, tokens)])


def test_bins_are_narrow_at_first_and_never_wide() -> None:
    widths = np.diff(LAST, prepend=0)
    assert (widths[:48] == 1).all()
    assert (widths[48:] / LAST[48:]).max() < 0.06
    assert LAST[-1] == 1 << 20


@FORMS
def test_a_cell_is_the_mean_of_its_outputs_and_those_above(form: Form) -> None:
    above, own = [(10, False)] * 300 + [(30, False)] * 300, [(20, False)] * 5
    longer, of_all = curve([above, own], form), curve([above], form)
    for tokens in (9, 10, 19, 20, 29, 30):
        empirical = float(tokens < 20)
        wanted = (5 * empirical + SHRINKAGE * share_longer(of_all, tokens)) / (5 + SHRINKAGE)
        assert share_longer(longer, tokens) == pytest.approx(wanted, abs=1e-9)


def test_without_outputs_of_its_own_a_cell_is_as_all() -> None:
    above = [(10, False), (400, False), (90, True)] * 40
    np.testing.assert_allclose(curve([above, []]), curve([above]), atol=1e-12)


def test_many_outputs_of_its_own_count_alone() -> None:
    longer = curve([[(2000, False)] * 500, [(40, False)] * 400])
    assert quantiles(longer) == [40, 40, 40]
    # At what only other requests reach, theirs is all that there is to know.
    low, middle, high = quantiles(longer, 500)
    assert 1400 < low <= middle <= high < 1600


def kaplan_meier(outputs: list[tuple[int, bool]], tokens: int) -> float:
    share = 1.0
    for at in sorted({length for length, was_cut in outputs if not was_cut and length <= tokens}):
        at_risk = sum(length >= at for length, _ in outputs)
        share *= 1.0 - sum(length == at and not was_cut for length, was_cut in outputs) / at_risk
    return share


@given(st.lists(st.tuples(st.integers(1, 48), st.booleans()), min_size=200, max_size=300))
def test_cut_outputs_count_as_longer_than_they_became(outputs: list[tuple[int, bool]]) -> None:
    longer = curve([outputs])
    for tokens in (1, 10, 25, 40):
        at_risk = sum(length >= tokens for length, _ in outputs)
        # The curve above counts as one output.
        assert share_longer(longer, tokens) == pytest.approx(kaplan_meier(outputs, tokens), abs=3 / max(at_risk, 1))


def test_a_limit_is_no_evidence_of_short_answers() -> None:
    ended = [(100, False)] * 50 + [(1000, False)] * 50
    limited = [(100, False)] * 50 + [(200, True)] * 50
    assert quantiles(curve([ended + limited]), 250)[1] == pytest.approx(750, rel=0.05)
    as_short = [(tokens, False) for tokens, _ in ended + limited]
    assert share_longer(curve([ended + limited]), 500) > 1.8 * share_longer(curve([as_short]), 500)


def test_older_outputs_lose_weight() -> None:
    assert quantiles(curve([[], [(40, False)] * 3000 + [(700, False)] * 3000]))[0] > 600


@given(
    cells=st.lists(st.lists(st.tuples(st.integers(0, 1 << 40), st.booleans()), max_size=30), min_size=1, max_size=4),
    generated=st.one_of(st.integers(0, 5000), st.integers(0, 1 << 50)),
)
def test_quantiles_are_always_usable(cells: list[list[tuple[int, bool]]], generated: int) -> None:
    longer = curve(cells)
    assert (np.diff(longer, prepend=1.0) <= 1e-15).all()
    assert (longer >= 0.0).all()
    got = quantiles(longer, generated, (0.0, 0.1, 0.5, 0.9, 0.999, 1.0))
    assert all(math.isfinite(one) and one >= 1.0 for one in got)
    assert got == sorted(got)
    assert all(one + generated <= max(1 << 20, generated + 1) for one in got)


@FORMS
@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=300, max_size=600),
    generated=st.integers(0, 400),
)
def test_quantiles_are_those_of_what_followed(form: Form, lengths: list[int], generated: int) -> None:
    longer = [tokens - generated for tokens in lengths if tokens > generated]
    if len(longer) < 200:
        return
    got = np.empty(3)
    form(length_curves.expect)(curve([[(tokens, False) for tokens in lengths]], form), generated, LEVELS, got)
    for level, quantile in zip(LEVELS, got, strict=True):
        low, high = np.quantile(longer, [max(level - 0.02, 0.0), min(level + 0.02, 1.0)], method="closest_observation")
        assert low - 0.06 * (low + generated) - 1 <= quantile <= high + 0.06 * (high + generated) + 1


def test_the_cell_of_all_is_the_first() -> None:
    assert ALL == 0
