"""What this gateway has sent to an instance to compute, and how long the instance takes for it."""

import time

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
        # By the caller's number: tokens to compute, when it was sent, and when it counts no more.
        self._sent: dict[int, tuple[int, float, float]] = {}
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
        return sum(tokens for tokens, _, _ in self._sent.values())

    @property
    def coefficients(self) -> tuple[float, float] | None:
        """Seconds of a prompt, and of each of its tokens; None before enough prompts were computed."""
        fitted = self._fit.coefficients
        return None if fitted is None else (float(fitted[0]), float(fitted[1]))

    @property
    def mean_token_s(self) -> float | None:
        """Seconds of a token in the mean of the prompts, what each takes besides included; None before the first.

        Where answers come late, some prompts seem to take no time and others all of it: that does not change the mean.
        """
        return self._seconds / self._computed if self._computed else None

    def begin(self, number: int, tokens: int, expires_s: float = float("inf")) -> None:
        """Count a prompt that has been sent, until its end or for so long."""
        now = time.monotonic()
        self._sent[number] = (tokens, now, now + expires_s)

    def end(self, number: int, computed: int | None) -> None:
        """Note the end of a prompt, of which so many tokens were computed; None: it failed."""
        sent = self._sent.pop(number, None)
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

    def _expire(self) -> None:
        now = time.monotonic()
        for number in [number for number, (_, _, until) in self._sent.items() if until <= now]:
            del self._sent[number]
