"""What a gateway knows of output lengths without a predictor: how long the outputs were that ended lately."""

import numpy as np

from ares.wire import REMAINING_LEVELS


class LengthHistory:
    """The outputs that ended lately, and what they say of those that still run (policy/residual_life.py)."""

    def __init__(self) -> None:
        from ares.policy import residual_life  # imports numba, where it is installed

        self._rule = residual_life
        self._lately = np.zeros(residual_life.REMEMBERED, np.int64)
        self._sorted = np.zeros(residual_life.REMEMBERED, np.int64)
        self._ended = 0
        # Compile both now, not while streams run: what is written here is overwritten by the first output.
        residual_life.remember(self._lately, self._sorted, 0, 0)
        self.remaining(0)

    def add(self, tokens: int) -> None:
        """Remember an output that came to its own end."""
        self._rule.remember(self._lately, self._sorted, self._ended, tokens)
        self._ended += 1

    def remaining(self, generated: int) -> tuple[float, float, float]:
        """Return quantiles of the tokens that follow `generated` ones, at `wire.REMAINING_LEVELS`."""
        quantiles = np.empty(len(REMAINING_LEVELS))
        self._rule.expect(self._sorted, self._ended, generated, REMAINING_LEVELS, quantiles)
        low, middle, high = quantiles.tolist()
        return low, middle, high
