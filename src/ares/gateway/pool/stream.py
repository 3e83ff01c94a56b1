"""One streamed generation on an instance: its tokens, from its reply and from the step channel, as they arrive."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple, Protocol

import msgspec

from ares.gateway.pool.connection import BrokenReplyError, Reply
from ares.gateway.pool.delta import Delta, EngineLostError, EngineRefusedError
from ares.gateway.pool.merged_tokens import MergedTokens
from ares.gateway.tuning import DEFAULT, Tuning

# Errors of bytes that no engine sends: no JSON, no UTF-8, an error whose code is no number, endless nesting.
MALFORMED = (msgspec.DecodeError, TypeError, ValueError, RecursionError)
_TOKEN_IDS = b'"token_ids":['
# Longer ids are no model's.
_ID_DIGITS = 9


class _Chunk(msgspec.Struct):
    choices: list[Delta] = []
    error: dict[str, Any] | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class _Form(NamedTuple):
    """What the events of a stream with one token and nothing else have in common: all but the digits of the token."""

    before: bytes
    after: bytes

    @classmethod
    def of(cls, event: bytes, parsed: Delta) -> "_Form | None":
        """Return the form of an event that was parsed; None where it has more than one token, or other than that."""
        if parsed.finish_reason is not None or parsed.stop_reason is not None or parsed.logprobs is not None:
            return None
        ids = parsed.token_ids
        if not ids or len(ids) != 1 or event.count(_TOKEN_IDS) != 1:
            return None
        before, name, value = event.partition(_TOKEN_IDS)
        digits, end, after = value.partition(b"]")
        return cls(before + name, end + after) if digits == b"%d" % ids[0] else None

    def token(self, event: bytes) -> int | None:
        """Return the token of an event of this form; None for any other, which has to be parsed."""
        if not (event.startswith(self.before) and event.endswith(self.after)):
            return None
        digits = event[len(self.before) : -len(self.after)]
        # JSON has no leading zeros.
        return int(digits) if digits.isdigit() and len(digits) <= _ID_DIGITS and digits[:1] != b"0" else None


# That of no event.
_NO_FORM = _Form(b"\0", b"\0")


class Taker(Protocol):
    """Takes tokens as they arrive, so that no task is woken for them. What it raises, `Stream.batch` raises."""

    def take(self, batch: list[Delta]) -> bool:
        """Take the tokens of a read; return whether they are done with, and nothing is to be woken."""

    def take_token(self, token_id: int) -> bool:
        """Take a token in the middle of an output; return whether that was done: otherwise `take` gets it."""


class Stream(Reply):
    """An open generation on an instance; `ready` is set when the instance has accepted it. Close it to abort it.

    Parameters
    ----------
    merged
        Merges the tokens of a step channel with those of the reply; None: there is no step channel.
    on_end
        Called when the reply has ended, or was lost.

    Attributes
    ----------
    receive_step_tokens
        Takes the instance's position and tokens of the step channel (`MergedTokens.receive_step_tokens`). The reader
        gets them when it is woken, or with what the reply brings.
    """

    __slots__ = (
        "_arrival",
        "_complete",
        "_form",
        "_left",
        "_lost",
        "_merged",
        "_on_end",
        "_received",
        "_taker",
        "_tuning",
        "_unread",
        "receive_step_tokens",
    )

    def __init__(
        self,
        tuning: Tuning = DEFAULT,
        merged: MergedTokens | None = None,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__()
        self._tuning = tuning
        self._merged = merged
        self.receive_step_tokens = (merged or MergedTokens()).receive_step_tokens
        self._on_end = on_end
        self._received: list[bytes] = []
        self._unread = 0
        # Begin of an event whose end has not come.
        self._left = b""
        self._form = _NO_FORM
        # Set to what the taker has left while a reader waits.
        self._arrival: asyncio.Future[list[Delta]] | None = None
        self._taker: Taker | None = None
        self._complete = False
        self._lost: BrokenReplyError | None = None

    @property
    def starved(self) -> bool:
        """Whether its reader waits for data."""
        return self._arrival is not None and not self._arrival.done()

    @property
    def early_tokens(self) -> int:
        """How many of its tokens the step channel has brought."""
        return self._merged.early_tokens if self._merged is not None else 0

    async def batches(self) -> AsyncIterator[list[Delta]]:
        """Yield the new tokens of each read; the errors are those of `batch`."""
        while batch := await self.batch():
            yield batch

    async def batch(self, taker: Taker | None = None) -> list[Delta]:
        """Return the next new tokens, those of one read; empty at the end.

        Parameters
        ----------
        taker
            Given the tokens of a read as they arrive while this waits.

        Raises
        ------
        EngineLostError
            The connection broke before the stream ended.
        EngineRefusedError
            The engine failed the request.
        DifferentTokensError
            The step channel has brought other tokens than the reply: the output cannot be continued.
        """
        while True:
            if self._received or (self._merged is not None and self._merged.waiting):
                batch = self._next_batch()
            elif self._complete:
                return []
            else:
                self._taker = taker
                try:
                    batch = await self._more()
                finally:
                    self._taker = None
            if batch:
                return batch

    def wake(self) -> None:
        """Give what has arrived to the taker, and wake the reader where there is more to do."""
        arrival, taker = self._arrival, self._taker
        if arrival is None or arrival.done():
            return
        left: list[Delta] = []
        try:
            if taker is not None:
                # Nearly always tokens of the step channel have come, and nothing else.
                if self._received or self._merged is None or not self._merged.give(taker.take_token):
                    left = self._next_batch()
                if not left or taker.take(left):
                    if self._lost is None and not self._complete:
                        return
                    left = []
        except Exception as error:  # of the taker, which is its reader's
            arrival.set_exception(error)
        else:
            arrival.set_result(left)

    async def text(self) -> str:
        """Return the rest of the reply; EngineLostError where it is too large, or breaks off."""
        parts, size = [], 0
        while data := await self._read():
            size += len(data)
            if size > self._tuning.reply_bytes:
                raise EngineLostError(f"the reply is larger than {self._tuning.reply_bytes} bytes")
            parts.append(data)
        return b"".join(parts).decode(errors="replace")

    async def _read(self) -> bytes:
        """Return the data that has arrived, or wait for some; empty at the end."""
        while not self._received:
            if self._complete:
                return b""
            await self._more()
        return self._drain()

    async def _more(self) -> list[Delta]:
        """Wait until something has arrived; return what `take` has left of it."""
        if self._lost is not None:
            raise EngineLostError(f"the stream broke: {self._lost}") from self._lost
        self._arrival = asyncio.get_running_loop().create_future()
        return await self._arrival

    def _drain(self) -> bytes:
        """Return the data that has arrived."""
        data = self._received[0] if len(self._received) == 1 else b"".join(self._received)
        self._received.clear()
        if self._unread > self._tuning.unread_bytes and self.connection is not None:
            self.connection.resume_reading()
        self._unread = 0
        return data

    def _next_batch(self) -> list[Delta]:
        """Return the new tokens of what has come, over the step channel and in complete events; errors as `batch`."""
        batch = self._parse(self._drain()) if self._received else []
        if (merged := self._merged) is None:
            return batch
        for delta in batch:
            merged.streamed(delta.token_ids or [])
            if delta.finish_reason not in (None, "abort"):  # what has come before an abort is of the output
                merged.end()
        deltas = [Delta(token_ids=token_ids) for token_ids in merged.take()]
        if batch and (last := batch[-1]).finish_reason is not None:
            end = deltas[-1] if deltas else Delta(token_ids=[])
            end.finish_reason, end.stop_reason = last.finish_reason, last.stop_reason
            return deltas or [end]
        return deltas

    def _parse(self, data: bytes) -> list[Delta]:
        """Return the new tokens of the events that are complete; EngineLostError, EngineRefusedError."""
        if self._left:
            data = self._left + data
        token = self._form.token(data)
        if token is not None:
            self._left = b""
            return [Delta(token_ids=[token])]
        *events, self._left = data.split(b"\n\n")
        batch: list[Delta] = []
        try:
            if len(self._left) > self._tuning.event_bytes:
                raise ValueError(f"an event is larger than {self._tuning.event_bytes} bytes")
            for event in events:
                if event == b"data: [DONE]":
                    continue
                chunk = _decode_chunk(event[6:])
                if chunk.error is not None:
                    raise EngineRefusedError(
                        int(chunk.error.get("code") or 500), str(chunk.error.get("message", "the engine failed"))
                    )
                batch += chunk.choices
        except MALFORMED as error:
            raise EngineLostError(f"the stream broke: {error!r}") from error
        if len(batch) == 1 and len(events) == 1 and not self._left:
            self._form = _Form.of(data, batch[0]) or self._form
        return batch

    # --- its connection calls these ---

    def status_received(self, status: int) -> None:
        """Be ready."""
        if not self.ready.done():
            self.ready.set_result(status)

    def body_received(self, data: bytes) -> None:
        """Keep a piece of the body, and pause the engine when too much is unread."""
        self._received.append(data)
        before = self._unread
        self._unread += len(data)
        if before <= self._tuning.unread_bytes < self._unread and self.connection is not None:
            self.connection.pause_reading()

    def arrived(self) -> None:
        """Wake the reader."""
        self.wake()

    def ended(self) -> None:
        """Note that the output is complete."""
        self._complete = True
        self._on_end()

    def lost(self, error: BrokenReplyError) -> None:
        """Note why the stream broke."""
        super().lost(error)
        self._lost = error
        self._on_end()
        self.wake()
