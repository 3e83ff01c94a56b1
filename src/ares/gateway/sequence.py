"""One generated sequence: prefill, decode, and every move between, as one unbroken run of tokens."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ares.gateway.engine import Delta, EngineLostError, EngineRefusedError
from ares.gateway.instances import Instance, NoInstanceError, Placement
from ares.gateway.migration import HandoverError, Migration, Move, NotMovableError, Segment, UntakenError
from ares.gateway.sampling import Sampling

T = TypeVar("T")

# Given new tokens; returns whether the output is complete (a stop string was found).
Emit = Callable[[list[Delta]], Awaitable[bool]]

# Instances that are tried for one step of a sequence before the client gets an error.
_ATTEMPTS = 3
# How long a `Handover` may trail the end of the stream that it explains, or an `Admitted` the first token.
_LAG_S = 1.0
# How long a sequence waits for an instance to decode on when none is open.
_PLACEMENT_TRIES = 15
_PLACEMENT_PAUSE_S = 0.2
_MIGRATED = "migrated"


@dataclass(slots=True)
class Sequence:
    """A sequence and where it runs. `run` drives it; `migrate` may be called from any other task meanwhile."""

    id: str
    prompt: list[int]
    sampling: Sampling
    placement: Placement
    handover_timeout_s: float
    emitted: list[int] = field(default_factory=list)
    moved_at: float = 0.0
    moves: int = 0
    _nonce: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _segments: int = 0
    _segment: Segment | None = None
    _decoding: bool = False
    _finished: bool = False
    _closed: bool = False
    _losses: int = 0
    _last_token_at: float = 0.0
    _move: Move | None = None
    # The instance and key whose KV waits for this sequence, until somebody else has it.
    _holder: tuple[Instance, str] | None = None
    _waiting: tuple[Instance, asyncio.Future[Any]] | None = None
    _background: set[asyncio.Task[Any]] = field(default_factory=set)

    # --- what others may ask ---

    @property
    def instance(self) -> Instance | None:
        """Where it runs now."""
        return self._segment.instance if self._segment else None

    @property
    def key(self) -> str | None:
        """Its name on that instance."""
        return self._segment.key if self._segment else None

    @property
    def tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.prompt) + len(self.emitted)

    @property
    def moving(self) -> bool:
        """Whether a hand-over is under way."""
        return self._move is not None

    @property
    def incoming(self) -> Instance | None:
        """The instance that a hand-over is bringing it to."""
        return self._move.target if self._move and self._segment is self._move.source else None

    def not_movable(self) -> str | None:
        """Say why it cannot be moved now, or return None."""
        if self.sampling.pinned is not None:
            return self.sampling.pinned
        if self._finished or self._closed:
            return "finished"
        if not self._decoding:
            return "not_decoding"
        return "moving" if self._move is not None else None

    # --- the run ---

    async def run(self, emit: Emit) -> None:
        """Generate the whole sequence, giving every token to `emit` exactly once and in order.

        Raises
        ------
        NoInstanceError
            No instance took it.
        EngineLostError
            Its instance died and it cannot be resumed exactly elsewhere.
        EngineRefusedError
            An instance refused it.
        """
        try:
            transfer = await self._prefill(emit)
            if self._finished:
                return
            segment: Segment | None = await self._enter(transfer)
            while segment is not None:
                self._segment = segment
                try:
                    if await self._relay(segment, emit):
                        return
                    segment = await self._hand_over(segment)
                except EngineLostError as error:
                    segment = await self._recover(segment, error, emit)
        finally:
            self._close()

    async def _prefill(self, emit: Emit) -> dict[str, Any] | None:
        """Compute the prompt and the first token; return what the decode instance needs to pull the KV."""
        alone = self.sampling.maximum_tokens == 1
        for _ in range(_ATTEMPTS):
            instance = self.placement.prefill()
            if instance is None:
                return None
            key = self._next_key()
            if not alone:
                self._holder = (instance, key)
            work = instance.engine.complete(self.sampling.prefill(key, self.prompt))
            try:
                delta, transfer = await self._answer(instance, work)
            except (EngineLostError, EngineRefusedError) as error:
                self._free_holder()
                instance.blame(error)
                continue
            if self.sampling.pinned is None or alone:
                if delta.finish_reason == "length" and not alone:
                    delta.finish_reason = None
                await self._give([delta], emit)
            return transfer
        return None

    async def _enter(self, transfer: dict[str, Any] | None, prefer: Instance | None = None) -> Segment:
        """Start, or go on from the tokens so far, on a decode instance."""
        tried: set[str] = set()
        lost: Exception | None = None
        for _ in range(_ATTEMPTS):
            instance = prefer or await self._decode_instance(tried)
            prefer = None
            if instance is None:
                break
            try:
                return await self._answer(instance, self._open(instance, self.emitted, transfer))
            except (EngineLostError, EngineRefusedError) as error:
                instance.blame(error)
                lost = error
                tried.add(instance.name)
        raise lost or NoInstanceError("no decode instance is ready")

    async def _decode_instance(self, exclude: set[str]) -> Instance | None:
        """Return where to decode; an instance that was blamed for a broken stream is given time to be heard again."""
        for _ in range(_PLACEMENT_TRIES):
            instance = self.placement.decode(self.tokens, exclude)
            if instance is not None:
                return instance
            await asyncio.sleep(_PLACEMENT_PAUSE_S)
        return None

    async def _answer(self, instance: Instance, work: Coroutine[Any, Any, T]) -> T:
        """Wait for an answer of an instance, but not of one that freezes meanwhile (see `supervise`)."""
        task = asyncio.ensure_future(work)
        self._waiting = (instance, task)
        try:
            return await task
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if me is not None and me.cancelling():
                raise
            raise EngineLostError("the instance has fallen silent") from None
        finally:
            self._waiting = None

    def supervise(self, loading_s: float) -> None:
        """Stop waiting for an instance that has frozen, or for KV that does not come.

        Parameters
        ----------
        loading_s
            For how long the instance has reported the sequence as loading KV.
        """
        if self._waiting is not None and self._waiting[0].frozen:
            self._waiting[1].cancel()
        segment = self._segment
        if segment is not None and (segment.instance.frozen or loading_s > 2 * self.handover_timeout_s):
            segment.stream.close()

    async def _open(
        self, instance: Instance, emitted: list[int], transfer: dict[str, Any] | None, key: str | None = None
    ) -> Segment:
        """Start a segment; returns when the instance has accepted it."""
        key = key or self._next_key()
        body = self.sampling.decode(key, self.prompt, emitted, transfer)
        pin = None
        if transfer is not None:
            # From here on the pulling instance sees to the pin, also when it is aborted.
            pin, self._holder = self._holder, None
        try:
            stream = await instance.engine.stream(body)
        except BaseException:
            self._holder = pin or self._holder
            if self._closed:
                self._free_holder()
            raise
        return Segment(instance, key, len(emitted), stream, pin)

    def _next_key(self) -> str:
        self._segments += 1
        return f"{self._nonce}/{self._segments}"

    async def _relay(self, segment: Segment, emit: Emit) -> bool:
        """Give out what the stream brings; return whether the output is finished, or cut for a hand-over."""
        arriving = self._move
        try:
            async with asyncio.timeout(self.handover_timeout_s if arriving else None) as limit:
                async for batch in segment.stream.batches():
                    if arriving is not None:
                        # The first tokens after a hand-over: it has worked.
                        limit.reschedule(None)
                        self._arrived(arriving)
                        arriving = None
                    self._decoding = True
                    last = batch[-1]
                    if last.finish_reason == "abort":
                        raise EngineLostError("the instance aborted the request")
                    cut = last.stop_reason == _MIGRATED
                    if cut:
                        last.finish_reason = last.stop_reason = None
                    if await self._give(batch, emit):
                        return True
                    if cut:
                        return False
        except TimeoutError:
            raise EngineLostError("no token after the hand-over in time") from None
        except EngineRefusedError as error:
            if not self._decoding:
                # vLLM checks some parameters only after it has accepted the stream: nothing of it ran, or pulled.
                self._holder = segment.pin
            if error.status < 500:
                raise
            raise EngineLostError(str(error)) from error
        finally:
            self._decoding = False
            segment.stream.close()
        raise EngineLostError("the stream ended before the output did")

    async def _give(self, batch: list[Delta], emit: Emit) -> bool:
        for delta in batch:
            self.emitted += delta.token_ids or []
        self._last_token_at = time.monotonic()
        stopped = await emit(batch)
        self._finished = stopped or batch[-1].finish_reason is not None
        return self._finished

    # --- moves ---

    async def migrate(self, target: Instance, reason: str) -> Migration:
        """Move to `target` and return how it went; the stream of tokens just goes on.

        Raises
        ------
        NotMovableError
            It cannot be moved now; nothing was changed.
        """
        refusal = self.not_movable()
        source = self._segment
        if refusal is not None or source is None:
            raise NotMovableError(refusal or "not_decoding")
        record = Migration(request_id=self.id, source=source.instance.name, target=target.name, reason=reason)
        move = self._move = Move(source, target, record)
        ordered = time.monotonic()
        try:
            cut = await source.instance.cut(source.key, self.handover_timeout_s)
        except TimeoutError:
            # If the cut happens after all, the stream ends early and the sequence resumes from its tokens.
            return self._settle(move, "source_silent")
        if cut.outcome != "pinned":
            return self._settle(move, "not_running" if cut.outcome == "not_running" else "finished_first")
        if self._move is not move:  # the client left, or the source died
            await source.instance.release(source.key)
            return record
        known = time.monotonic()
        record.cut_s = known - ordered
        self._holder = (source.instance, source.key)
        move.handover.set_result(cut)
        if move.missing(len(self.emitted)) is None:
            await move.relayed.wait()
        if move.settled.is_set():
            return record
        key = self._next_key()
        try:
            async with asyncio.timeout(self.handover_timeout_s):
                tokens = self.emitted + (move.missing(len(self.emitted)) or [])
                segment = await self._open(target, tokens, cut.transfer, key)
        except (EngineLostError, EngineRefusedError, TimeoutError) as error:
            if not isinstance(error, EngineRefusedError):
                target.mark_lost()
            move.fail(error)
        else:
            if move.arrival.done():  # too late: nobody waits for it any more
                segment.stream.close()
            else:
                record.accept_s = time.monotonic() - known
                move.arrival.set_result(segment)
        await move.settled.wait()
        if record.outcome == "moved":
            admitted = await target.admitted(key, _LAG_S)
            if admitted is not None:
                record.pulled_tokens, record.queued_s = admitted.pulled, admitted.queued_s
        return record

    async def _hand_over(self, source: Segment) -> Segment:
        """Return the segment that the hand-over leads to."""
        move = self._move
        try:
            if move is None:
                raise HandoverError("nobody waits for it")
            await asyncio.wait_for(asyncio.shield(move.handover), _LAG_S)
        except (HandoverError, TimeoutError) as error:
            # Cut and pinned, but how to pull it is not known in time.
            self._holder = (source.instance, source.key)
            raise UntakenError(f"the request was cut and nobody took it over: {error}") from error
        move.relayed.set()
        try:
            return await asyncio.wait_for(asyncio.shield(move.arrival), self.handover_timeout_s)
        except (HandoverError, EngineLostError, EngineRefusedError, TimeoutError) as error:
            raise EngineLostError(f"the target did not take it: {error}") from error

    async def _recover(self, lost: Segment, error: EngineLostError, emit: Emit) -> Segment | None:
        """Go on from the tokens after a loss: at a hand-over's target, at its source, or anywhere; None at the end."""
        move, source = self._move, lost.instance
        if move is not None:
            source = move.source.instance
            missing = move.missing(len(self.emitted))
            carried = not missing or self.sampling.parameters.get("logprobs") is None
            if lost is move.source and not move.relayed.is_set() and missing is not None and carried:
                # The source broke off after the cut: what it had generated is not generated again.
                if missing and await self._give([Delta(token_ids=missing)], emit):
                    return None
                try:
                    return await self._hand_over(lost)
                except EngineLostError as second:
                    error = second
            move.abandon()
            self._settle(move, "returned")
        elif not isinstance(error, UntakenError):
            lost.instance.mark_lost()
            self._losses += 1
        self._free_holder()
        # The source still has the full blocks of this sequence in its prefix cache.
        prefer = source if source.open else None
        if self.sampling.pinned is not None and self.emitted:
            raise EngineLostError(f"{error}; {self.sampling.pinned} cannot be resumed exactly") from error
        if self._losses > _ATTEMPTS:
            raise error
        return await self._enter(None, prefer)

    def _arrived(self, move: Move) -> None:
        now = time.monotonic()
        move.record.stall_s = now - self._last_token_at
        self.moved_at = now
        self.moves += 1
        self._settle(move, "moved")

    def _settle(self, move: Move, outcome: str) -> Migration:
        if self._move is move:
            self._move = None
        return move.settle(outcome)

    def _free_holder(self) -> None:
        if self._holder is not None:
            instance, key = self._holder
            self._holder = None
            task = asyncio.ensure_future(instance.release(key))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    def _close(self) -> None:
        """Stop generating everywhere and leave nothing pinned."""
        self._closed = True
        if self._segment is not None:
            self._segment.stream.close()
        if (move := self._move) is not None:
            move.abandon()
            self._settle(move, "finished_first" if self._finished else "cancelled")
        self._free_holder()
