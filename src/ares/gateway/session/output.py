"""The output of a session: each token goes to the client once, in order."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ares.gateway.pool.generate import Delta

# Given new tokens; returns whether the output is complete (a stop string was found).
Emit = Callable[[list[Delta]], Awaitable[bool]]


@dataclass(slots=True)
class Output:
    """What the client has been given.

    Attributes
    ----------
    tokens
        Token ids so far.
    finished
        Whether it is complete.
    at_limit
        Whether it is complete only because it reached the limit of its tokens.
    first_token_at, last_token_at
        Times of `time.monotonic`; 0 before the first token.
    longest_gap_s
        Longest time between two deliveries, for any reason.
    """

    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    at_limit: bool = False
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    longest_gap_s: float = 0.0

    async def deliver(self, batch: list[Delta], emit: Emit) -> bool:
        """Give new tokens to the client; return whether the output is complete."""
        for delta in batch:
            self.tokens += delta.token_ids or []
        now = time.monotonic()
        if self.last_token_at:
            self.longest_gap_s = max(self.longest_gap_s, now - self.last_token_at)
        self.last_token_at = now
        self.first_token_at = self.first_token_at or now
        stopped = await emit(batch)
        self.finished = stopped or batch[-1].finish_reason is not None
        self.at_limit = not stopped and batch[-1].finish_reason == "length"
        return self.finished
