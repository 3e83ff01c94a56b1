"""What this gateway has sent to an instance to compute, and is not computed yet."""

import math
import time
from collections import deque
from itertools import takewhile

_NEWEST_WEIGHT = 0.1
# An instance reports what it holds much sooner.
_PLACED_S = 60.0


class PrefillQueue:
    """The prompts that one instance computes for this gateway; times by `time.monotonic`.

    Attributes
    ----------
    mean_tokens
        Tokens to compute of a prompt, as a moving average over those that were sent; 0 before the first.
    """

    def __init__(self) -> None:
        self.mean_tokens = 0.0
        # By the caller's number, the newest last: tokens to compute, and when it was sent; and when it counts no more.
        self._sent: dict[int, tuple[int, float]] = {}
        self._tokens = 0
        self._until: dict[int, float] = {}
        # Before that, none of `_until` has passed.
        self._soonest = math.inf
        # Prompts that stay on the instance to be decoded, the newest last: when they were sent, and their tokens.
        self._placed: deque[tuple[float, int]] = deque()

    def __len__(self) -> int:
        self._expire()
        return len(self._sent)

    @property
    def tokens(self) -> int:
        """Tokens that are still to be computed."""
        self._expire()
        return self._tokens

    def sent_since(self, moment: float) -> int:
        """Return how many of the prompts that are still to be computed were sent after a moment."""
        self._expire()
        return sum(1 for _ in takewhile(lambda sent: sent[1] > moment, reversed(self._sent.values())))

    def place(self, tokens: int) -> None:
        """Count the KV of a prompt that stays on the instance to be decoded, computed or not."""
        now = time.monotonic()
        self._placed.append((now, tokens))
        while self._placed[0][0] < now - _PLACED_S:
            self._placed.popleft()

    def placed_since(self, moment: float) -> int:
        """Return the tokens that were placed after a moment; those before it are forgotten."""
        while self._placed and self._placed[0][0] <= moment:
            self._placed.popleft()
        return sum(tokens for _, tokens in self._placed)

    def begin(self, number: int, tokens: int, expires_s: float | None = None) -> None:
        """Count a prompt that has been sent, until its end or for so long."""
        now = time.monotonic()
        self.end(number)
        self.mean_tokens += (tokens - self.mean_tokens) * (_NEWEST_WEIGHT if self.mean_tokens else 1.0)
        self._sent[number] = (tokens, now)
        self._tokens += tokens
        if expires_s is not None:
            self._until[number] = now + expires_s
            self._soonest = min(self._soonest, now + expires_s)

    def end(self, number: int) -> None:
        """Note that a prompt has been computed, or has failed."""
        self._until.pop(number, None)
        tokens, _ = self._sent.pop(number, (0, 0.0))
        self._tokens -= tokens

    def _expire(self) -> None:
        now = time.monotonic()
        if now < self._soonest:
            return
        for number in [number for number, until in self._until.items() if until <= now]:
            self.end(number)
        self._soonest = min(self._until.values(), default=math.inf)
