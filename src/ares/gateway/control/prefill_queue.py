"""What this gateway has sent to an instance to compute, and how long the instance takes for it."""

import time
from itertools import takewhile

import numpy as np

from ares.policy.cost_model import OnlineLeastSquares

# Prompts that end within so little time have been computed together.
_TOGETHER_S = 0.002
# Weight of a prompt relative to the one after it.
_FORGETTING = 0.98


class PrefillQueue:
    """The prompts that one instance computes for this gateway; times by `time.monotonic`."""

    def __init__(self) -> None:
        self._fit = OnlineLeastSquares(2, forgetting=_FORGETTING, minimum=8)
        # By the caller's number, the newest last: tokens to compute, and when it was sent; and when it counts no more.
        self._sent: dict[int, tuple[int, float]] = {}
        self._until: dict[int, float] = {}
        # Of the prompts so far, older ones counting less.
        self._seconds = self._computed = 0.0
        self._last_end = 0.0
        # The newest measurement, which another prompt may still belong to: tokens and seconds.
        self._newest = (0, 0.0)

    def __len__(self) -> int:
        self._expire()
        return len(self._sent)

    @property
    def tokens(self) -> int:
        """Tokens that are still to be computed."""
        self._expire()
        return sum(tokens for tokens, _ in self._sent.values())

    @property
    def coefficients(self) -> tuple[float, float] | None:
        """Seconds of a prompt, and of each of its tokens; None before enough prompts were computed."""
        fitted = self._fit.coefficients
        return None if fitted is None else (float(fitted[0]), float(fitted[1]))

    @property
    def mean_token_s(self) -> float | None:
        """Mean seconds per prompt token, the fixed cost of each prompt included; None before the first prompt.

        Where answers come late, some prompts seem to take no time and others all of it: that does not change the mean.
        """
        return self._seconds / self._computed if self._computed else None

    def sent_since(self, moment: float) -> int:
        """Return how many of the prompts that are still to be computed were sent after a moment."""
        self._expire()
        return sum(1 for _ in takewhile(lambda sent: sent[1] > moment, reversed(self._sent.values())))

    def begin(self, number: int, tokens: int, expires_s: float | None = None) -> None:
        """Count a prompt that has been sent, until its end or for so long."""
        now = time.monotonic()
        self._drop(number)
        self._sent[number] = (tokens, now)
        if expires_s is not None:
            self._until[number] = now + expires_s

    def end(self, number: int, computed: int | None) -> None:
        """Note the end of a prompt, of which so many tokens were computed; None: it failed."""
        sent = self._drop(number)
        now = time.monotonic()
        if sent is not None and computed is not None:
            took_s = now - max(sent[1], self._last_end)
            self._seconds = _FORGETTING * self._seconds + took_s
            self._computed = _FORGETTING * self._computed + computed
            if took_s < _TOGETHER_S:
                self._newest = self._newest[0] + computed, self._newest[1] + took_s
            else:
                self._add_newest()
                self._newest = computed, took_s
        self._last_end = now

    def _add_newest(self) -> None:
        tokens, seconds = self._newest
        self._fit.add(np.array([1.0, float(tokens)]), seconds)

    def _drop(self, number: int) -> tuple[int, float] | None:
        self._until.pop(number, None)
        return self._sent.pop(number, None)

    def _expire(self) -> None:
        now = time.monotonic()
        for number in [number for number, until in self._until.items() if until <= now]:
            self._drop(number)
