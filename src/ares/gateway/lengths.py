"""What a gateway knows of output lengths without a predictor: how long the outputs were that ended lately."""

import bisect
from collections import deque

import numpy as np

from ares.wire import REMAINING_LEVELS

_REMEMBERED = 2000
# Fewer outputs of at least this length say too little about those that are longer.
_ENOUGH = 16
# Until then, a request is expected to go on about as long as it has, and this long at least.
_PRIOR_TOKENS = 256.0


class LengthHistory:
    """Residual life: how much longer outputs went on that had come as far."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=_REMEMBERED)
        self._sorted: list[int] = []

    def add(self, tokens: int) -> None:
        """Remember an output that came to its own end."""
        if len(self._recent) == _REMEMBERED:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent[0])]
        self._recent.append(tokens)
        bisect.insort(self._sorted, tokens)

    def remaining(self, generated: int) -> tuple[float, float, float]:
        """Return quantiles of the tokens that follow `generated` ones, at `wire.REMAINING_LEVELS`."""
        longer = len(self._sorted) - (first := bisect.bisect_right(self._sorted, generated))
        if longer < _ENOUGH:
            mean = max(_PRIOR_TOKENS, float(generated))
            low, middle, high = (-mean * float(np.log1p(-level)) for level in REMAINING_LEVELS)
            return low, middle, high
        low, middle, high = (
            float(self._sorted[first + int(level * (longer - 1))] - generated) for level in REMAINING_LEVELS
        )
        return low, middle, high
