"""Remaining output lengths without a predictor, estimated from the lengths of recent outputs."""

from collections.abc import Callable
from functools import cache

import numpy as np

from ares.policy import residual_life
from ares.policy.compiling import compiled
from ares.protocol.messages import REMAINING_LEVELS

Remember = Callable[[residual_life.I8, residual_life.I8, int, int], None]
Expect = Callable[[residual_life.I8, int, int, tuple[float, ...], residual_life.F8], None]


class LengthHistory:
    """Lengths of recent outputs, and the remaining lengths estimated from them (policy/residual_life.py)."""

    def __init__(self) -> None:
        self._remember: Remember = residual_life.remember
        self._expect: Expect = residual_life.expect
        self._recent = np.zeros(residual_life.REMEMBERED, np.int64)
        self._sorted = np.zeros(residual_life.REMEMBERED, np.int64)
        self._ended = 0

    def compile(self) -> None:
        """Use compiled code from now on, fast enough for all running requests; where streams run, `prepare` first."""
        self._remember, self._expect = prepare()

    def add(self, tokens: int) -> None:
        """Add the length of a complete output."""
        self._remember(self._recent, self._sorted, self._ended, tokens)
        self._ended += 1

    def remaining(self, generated: int) -> tuple[float, float, float]:
        """Return quantiles of the tokens that follow `generated` ones, at `messages.REMAINING_LEVELS`."""
        quantiles = np.empty(len(REMAINING_LEVELS))
        self._expect(self._sorted, self._ended, generated, REMAINING_LEVELS, quantiles)
        low, middle, high = quantiles.tolist()
        return low, middle, high


@cache
def prepare() -> tuple[Remember, Expect]:
    """Compile the estimate where numba is installed."""
    remember, expect = compiled(residual_life.remember), compiled(residual_life.expect)
    recent, ordered = np.zeros(1, np.int64), np.zeros(1, np.int64)
    remember(recent, ordered, 0, 0)
    expect(ordered, 1, 0, REMAINING_LEVELS, np.empty(len(REMAINING_LEVELS)))
    return remember, expect
