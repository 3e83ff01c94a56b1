"""What takes the tokens of a sequence: to write them to the client of a stream, or to keep them for a whole reply."""

import asyncio
import time
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any

from ares.gateway.http.responses import Write
from ares.gateway.openai.replies import Choice
from ares.gateway.pool.delta import Delta
from ares.gateway.session.output import TokenEmitter

# Given the time of the first token (`time.monotonic`).
OnFirst = Callable[[float], None]


class SequenceEmitter(TokenEmitter):
    """Takes the tokens of the sequence that a choice shows.

    Attributes
    ----------
    first_at
        When the first ones came (`time.monotonic`); 0 before.
    """

    __slots__ = ("_choice", "_on_first", "first_at")

    def __init__(self, choice: Choice, on_first: OnFirst) -> None:
        self._choice, self._on_first = choice, on_first
        self.first_at = 0.0

    def __call__(self, batch: list[Delta]) -> bool | Coroutine[Any, Any, bool]:
        """Take new tokens (`Emit`)."""
        if not self.first_at:
            self.first_at = time.monotonic()
            self._on_first(self.first_at)
        return self.take(batch)

    @abstractmethod
    def take(self, batch: list[Delta]) -> bool | Coroutine[Any, Any, bool]:
        """Take new tokens; return what an `Emit` does."""

    def take_token(self, token_id: int) -> bool:
        """Take none alone."""
        return False


# Makes that of a choice.
NewEmitter = Callable[[Choice, OnFirst], SequenceEmitter]


class StreamEmitter(SequenceEmitter):
    """Writes tokens to the client of a stream as they come."""

    __slots__ = ("_write",)

    def __init__(self, write: Write, choice: Choice, on_first: OnFirst) -> None:
        super().__init__(choice, on_first)
        self._write = write

    def take(self, batch: list[Delta]) -> bool | Coroutine[Any, Any, bool]:
        """Write new tokens; a client that does not keep up, and tokens that take long, are to be awaited."""
        choice = self._choice
        if choice.slow:
            return self._in_thread(batch)
        data = choice.stream(batch)
        return choice.finish_reason is not None if self._write.now(data) else self._when_read(data)

    def take_token(self, token_id: int) -> bool:
        """Write a token in the middle of an output, if the client keeps up and its chunk has nothing but its text."""
        at_once = self._write.at_once
        if at_once is None or not at_once.possible or not (data := self._choice.stream_token(token_id)):
            return False
        at_once(data)
        self._write.last_at = time.monotonic()
        return True

    async def _when_read(self, data: bytes) -> bool:
        await self._write(data)
        return self._choice.finish_reason is not None

    async def _in_thread(self, batch: list[Delta]) -> bool:
        return await self._when_read(await asyncio.to_thread(self._choice.stream, batch))


class WholeEmitter(SequenceEmitter):
    """Keeps tokens for a reply that is sent as a whole."""

    __slots__ = ()

    def take(self, batch: list[Delta]) -> bool:
        """Keep new tokens."""
        self._choice.collect(batch)
        return self._choice.finish_reason is not None
