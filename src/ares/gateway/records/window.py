"""Recent measurements: sliding windows over finished sessions, bounded in time and in number."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

WINDOW_S = 60.0
WINDOW_VALUES = 2000
_PERCENTILES = (50, 90, 99)


class Window:
    """The newest values of one quantity: none older than `seconds`, no more than `limit`."""

    def __init__(
        self,
        seconds: float = WINDOW_S,
        limit: int = WINDOW_VALUES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._clock = clock
        self._values: deque[tuple[float, float]] = deque(maxlen=limit)

    def add(self, value: float) -> None:
        """Add a value measured now."""
        self._values.append((self._clock(), value))

    def extend(self, values: list[float]) -> None:
        """Add values of another window; they count from now on."""
        for value in values:
            self.add(value)

    def values(self) -> list[float]:
        """Return the values that are still in the window, the oldest first."""
        oldest = self._clock() - self._seconds
        while self._values and self._values[0][0] < oldest:
            self._values.popleft()
        return [value for _, value in self._values]


class Recent:
    """The windows of one gateway, with at most `limit` values each.

    Attributes
    ----------
    ttft_s
        Arrival to first token, of sessions whose first token came in the window.
    tpot_s
        (end - first token) / (output tokens - 1), of sessions that ended in it.
    longest_gap_s
        Longest time between two tokens, of sessions that ended in it.
    prediction_error_tokens
        Predicted less true remaining tokens, of sessions that ended in it; one value a position.
    """

    def __init__(self, limit: int = WINDOW_VALUES) -> None:
        self.ttft_s = Window(limit=limit)
        self.tpot_s = Window(limit=limit)
        self.longest_gap_s = Window(limit=limit)
        self.prediction_error_tokens = Window(limit=limit)

    def values(self) -> dict[str, list[float]]:
        """Return the values in all windows, by name."""
        return {name: window.values() for name, window in vars(self).items()}

    def extend(self, values: Mapping[str, list[float]]) -> None:
        """Add what `values` of another process returned."""
        for name, window in vars(self).items():
            window.extend(values[name])

    def summary(self) -> dict[str, Any]:
        """Return percentiles of the times, and size and sign of the prediction error; None without values."""
        return {
            "window_s": WINDOW_S,
            "ttft_s": _percentiles(self.ttft_s),
            "tpot_s": _percentiles(self.tpot_s),
            "longest_gap_s": _percentiles(self.longest_gap_s),
            "prediction_error_tokens": _error(self.prediction_error_tokens),
        }


def _percentiles(window: Window) -> dict[str, float | int | None]:
    values = window.values()
    points = np.percentile(values, _PERCENTILES).tolist() if values else [None] * len(_PERCENTILES)
    return {"count": len(values)} | {f"p{p}": value for p, value in zip(_PERCENTILES, points, strict=True)}


def _error(window: Window) -> dict[str, float | int | None]:
    errors = np.array(window.values())
    if not errors.size:
        return {"count": 0, "mean_absolute": None, "p90_absolute": None, "bias": None}
    return {
        "count": errors.size,
        "mean_absolute": float(np.abs(errors).mean()),
        "p90_absolute": float(np.percentile(np.abs(errors), 90)),
        "bias": float(errors.mean()),
    }
