"""The output of a session: each token goes to the client once, in order."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from ares.gateway.pool.delta import Delta, EngineLostError
from ares.gateway.pool.stream import Stream

# Given new tokens; returns whether the output is complete (a stop string was found), or what is to be awaited for that:
# a client that does not keep up, or tokens that take long.
Emit = Callable[[list[Delta]], bool | Coroutine[Any, Any, bool]]


class TokenEmitter(ABC):
    """An `Emit` that also takes a token alone, which costs less."""

    __slots__ = ()

    @abstractmethod
    def __call__(self, batch: list[Delta]) -> bool | Coroutine[Any, Any, bool]:
        """Take new tokens, as any `Emit`."""

    @abstractmethod
    def take_token(self, token_id: int) -> bool:
        """Take a token in the middle of an output; return whether that was done: otherwise it is to come in a batch."""


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
    step_tokens
        How many of the tokens have come over a step channel; counted when a stream ends.
    """

    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    at_limit: bool = False
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    longest_gap_s: float = 0.0
    step_tokens: int = 0

    async def deliver(self, batch: list[Delta], emit: Emit) -> bool:
        """Give new tokens to the client; return whether the output is complete."""
        stopped = self.give(batch, emit)
        return self.given(batch[-1], stopped if isinstance(stopped, bool) else await stopped)

    def give(self, batch: list[Delta], emit: Emit) -> bool | Coroutine[Any, Any, bool]:
        """Begin to give new tokens to the client; return what `emit` returns."""
        for delta in batch:
            self.tokens += delta.token_ids or []
        now = time.monotonic()
        if self.last_token_at:
            self.longest_gap_s = max(self.longest_gap_s, now - self.last_token_at)
        else:
            self.first_token_at = now
        self.last_token_at = now
        return emit(batch)

    def add(self, token_id: int) -> None:
        """Note a token that the client was given, and that is not its first."""
        self.tokens.append(token_id)
        now = time.monotonic()
        gap_s = now - self.last_token_at
        self.longest_gap_s = max(self.longest_gap_s, gap_s)
        self.last_token_at = now

    def given(self, last: Delta, stopped: bool) -> bool:
        """Note what `emit` has said of the tokens up to these; return whether the output is complete."""
        self.finished = stopped or last.finish_reason is not None
        self.at_limit = not stopped and last.finish_reason == "length"
        return self.finished


class Relay:
    """Gives the tokens of one stream to the client as they arrive, without waking a task for each read.

    Only what is more than tokens in the middle of an output comes out of `next`.
    """

    __slots__ = ("_begun", "_emit", "_emit_token", "_output", "_stream", "_unfinished")

    def __init__(self, stream: Stream, output: Output, emit: Emit) -> None:
        self._stream, self._output, self._emit = stream, output, emit
        self._emit_token = emit.take_token if isinstance(emit, TokenEmitter) else _not_taken
        self._begun = False
        # The last of tokens that the client did not take at once, or that complete the output, and what `emit` said.
        self._unfinished: tuple[Delta, bool | Coroutine[Any, Any, bool]] | None = None

    async def next(self) -> list[Delta]:
        """Return the next tokens that were not given: the first, those that end something, any that came meanwhile.

        Empty where the output is complete. The errors are those of `Stream.batch`, EngineLostError where the stream
        ends before the output, and what giving tokens raised.
        """
        while True:
            batch = await self._stream.batch(self if self._begun else None)
            unfinished, self._unfinished = self._unfinished, None
            if unfinished is None:
                if not batch:
                    raise EngineLostError("the stream ended before the output did")
                self._begun = True
                return batch
            last, stopped = unfinished
            if self._output.given(last, stopped if isinstance(stopped, bool) else await stopped):
                return []

    def close(self) -> None:
        """Drop what was not awaited, since its task was cancelled."""
        if self._unfinished is not None and not isinstance(self._unfinished[1], bool):
            self._unfinished[1].close()

    # --- the stream calls these, as tokens arrive ---

    def take_token(self, token_id: int) -> bool:
        """Give a token to the client; return whether that was done."""
        if not self._emit_token(token_id):
            return False
        self._output.add(token_id)
        return True

    def take(self, batch: list[Delta]) -> bool:
        """Give tokens to the client; return whether that was all."""
        last = batch[-1]
        if last.finish_reason is not None or last.stop_reason is not None:
            return False
        stopped = self._output.give(batch, self._emit)
        if stopped is False:
            return True
        self._unfinished = last, stopped
        return False


def _not_taken(_: int) -> bool:
    return False
