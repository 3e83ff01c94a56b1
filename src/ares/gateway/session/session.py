"""One generated sequence: prefill, decode, every move and suspension between, as one unbroken run of tokens."""

import asyncio
import time
from dataclasses import dataclass

from ares.gateway.pool.generate import Delta, EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import Instance
from ares.gateway.session.handover import (
    Handover,
    HandoverError,
    MigrationRecord,
    NotMovableError,
    Pin,
    Segment,
    UntakenError,
)
from ares.gateway.session.placement import Emit, Entering
from ares.policy.transfer import KEPT_S
from ares.protocol.fields import MIGRATED, CutOutcome

# How long a `Handover` may trail the end of the stream that it explains, or an `Admitted` the first token.
_LAG_S = 1.0


@dataclass(slots=True)
class Session(Entering):
    """A sequence and where it runs. `run` drives it; `migrate` and `suspend` may be called by other tasks meanwhile."""

    # --- what others may ask ---

    @property
    def moving(self) -> bool:
        """Whether a hand-over is under way."""
        return self._move is not None or self.copying is not None

    @property
    def incoming(self) -> Instance | None:
        """The instance that a hand-over is bringing it to."""
        return self._move.target if self._move and self._segment is self._move.source else self.copying

    def not_movable(self) -> str | None:
        """Say why it cannot be moved now, or return None."""
        if self.sampling.unmovable_reason is not None:
            return self.sampling.unmovable_reason
        if self._finished or self._closed:
            return "finished" if self._finished else "cancelled"
        if not self._decoding:
            return "not_decoding"
        if self._pausing:
            return "suspending"
        return "moving" if self.moving else None

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
            segment = await self._start(emit)
            while segment is not None:
                self._segment = segment
                try:
                    if await self._relay(segment, emit):
                        return
                    pausing = self._pausing
                    following = None if pausing else await self._hand_over(segment)
                except EngineLostError as error:
                    pausing = self._withdrawn
                    following = None if pausing else await self._recover(segment, error, emit)
                segment = await self._resume(emit) if pausing else following
        finally:
            self._close()

    async def _start(self, emit: Emit) -> Segment | None:
        """Prefill, wait to be admitted, and enter decode; None where the first token is the last.

        The first token is given once the sequence may decode: after it the stream goes on without a stop.
        """
        first, transfer = await self._prefill()
        if first is not None and first.finish_reason is not None:
            await self._give([first], emit)
            return None
        try:
            async with asyncio.timeout(KEPT_S):
                where = await self._admission(set())
        except TimeoutError:
            # The instance lets go of the KV soon. Nothing of it has been given out: it is prefilled again when there
            # is room.
            self._free_holder()
            where = await self._admission(set())
            self._turn("prefill")
            first, transfer = await self._prefill()
        if first is not None and await self._give([first], emit):
            return None
        return await self._enter(transfer, where)

    async def _resume(self, emit: Emit) -> Segment | None:
        """Wait to be admitted, prefill what there is so far, and enter; None where the next token is the last."""
        self._segment, self._pausing, self._withdrawn = None, False, False
        self._turn("suspended")
        self._free_holder()
        where = await self._admission(set())
        first, transfer = await self._prefill()
        if first is not None and await self._give([first], emit):
            return None
        return await self._enter(transfer, where)

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
                    if not self._decoding:
                        self._decoding = True
                        self.on_phase(self)
                    last = batch[-1]
                    if last.finish_reason == "abort":
                        raise EngineLostError("the instance aborted the request")
                    cut = last.stop_reason == MIGRATED
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

    # --- moves ---

    async def migrate(self, target: Instance, reason: str) -> MigrationRecord:
        """Handover to `target` and return how it went; the stream of tokens just goes on.

        Raises
        ------
        NotMovableError
            It cannot be moved now; nothing was changed.
        """
        refusal = self.not_movable()
        source = self._segment
        if refusal is not None or source is None:
            raise NotMovableError(refusal or "not_decoding")
        record = MigrationRecord(request_id=self.id, source=source.instance.name, target=target.name, reason=reason)
        move = self._move = Handover(source, target, record)
        ordered = time.monotonic()
        try:
            cut = await source.instance.control.cut(source.key, self.handover_timeout_s)
        except TimeoutError:
            # If the cut happens after all, the stream ends early and the sequence resumes from its tokens.
            return self._settle(move, "source_silent")
        if cut.outcome != CutOutcome.PINNED:
            return self._settle(move, "not_running" if cut.outcome == CutOutcome.NOT_RUNNING else "finished_first")
        if self._move is not move:  # the client left, or the source died
            await source.instance.control.release(source.key)
            return record
        known = time.monotonic()
        record.cut_s = known - ordered
        self._holder = Pin.at(source.instance, source.key)
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
                target.health.connection_failed()
            move.fail(error)
        else:
            if move.arrival.done():  # too late: nobody waits for it any more
                segment.stream.close()
            else:
                record.accept_s = time.monotonic() - known
                move.arrival.set_result(segment)
        await move.settled.wait()
        if record.outcome == "moved":
            admitted = await target.control.kv_received(key, _LAG_S)
            if admitted is not None:
                record.pulled_tokens, record.queued_s = admitted.pulled, admitted.queued_s
        return record

    async def suspend(self) -> str:
        """Stop generating and let the KV go until `placement` admits it again; return how that went, in one word.

        One that its instance has preempted is taken out of the queue there.

        Raises
        ------
        NotMovableError
            It cannot be cut now; nothing was changed.
        """
        refusal, source = self.not_movable(), self._segment
        if refusal is not None or source is None:
            raise NotMovableError(refusal or "not_decoding")
        self._pausing = True
        try:
            cut = await source.instance.control.cut(source.key, self.handover_timeout_s)
        except TimeoutError:
            if self._segment is source:  # should it be cut after all, it goes on from its tokens
                self._pausing = False
            return "source_silent"
        if cut.outcome == CutOutcome.NOT_RUNNING and self._segment is source and self._move is None:
            self._withdrawn = True
            self.suspensions += 1
            source.stream.close()
            return "withdrawn"
        if cut.outcome != CutOutcome.PINNED:
            self._pausing = False
            return cut.outcome
        self.suspensions += 1
        # Nobody will pull it: where it resumes, its tokens are prefilled again.
        await source.instance.control.release(source.key)
        return "suspended"

    async def _hand_over(self, source: Segment) -> Segment:
        """Return the segment that the hand-over leads to."""
        move = self._move
        try:
            if move is None:
                raise HandoverError("nobody waits for it")
            await asyncio.wait_for(asyncio.shield(move.handover), _LAG_S)
        except (HandoverError, TimeoutError) as error:
            # Cut and pinned, but how to pull it is not known in time.
            self._holder = Pin.at(source.instance, source.key)
            raise UntakenError(f"the request was cut and nobody took it over: {error}") from error
        move.relayed.set()
        try:
            return await asyncio.wait_for(asyncio.shield(move.arrival), self.handover_timeout_s)
        except (HandoverError, EngineLostError, EngineRefusedError, TimeoutError) as error:
            raise EngineLostError(f"the target did not take it: {error}") from error

    async def _recover(self, lost: Segment, error: EngineLostError, emit: Emit) -> Segment | None:
        """Go on from the tokens after a loss: at a hand-over's target, at its source, or anywhere; None at the end."""
        move, source = self._move, lost.instance
        self._pausing = False
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
        elif lost is not self._left and not isinstance(error, UntakenError):
            lost.instance.health.connection_failed()
            self._losses += 1
        self._free_holder()
        # The source still has the full blocks of this sequence in its prefix cache.
        prefer = source if source.open and not source.state.lacks(self.sampling.needs) else None
        if self.sampling.unmovable_reason is not None and self.emitted:
            raise EngineLostError(f"{error}; {self.sampling.unmovable_reason} cannot be resumed exactly") from error
        if self._losses > self.maximum_attempts:
            raise EngineLostError(f"lost {self._losses} times, the last time: {error}") from error
        self._segment = None
        return await (self._enter(None, prefer) if prefer is not None else self._resume(emit))

    def _arrived(self, move: Handover) -> None:
        self.moved_at = time.monotonic()
        move.record.stall_s = self.moved_at - self._last_token_at
        self.moves += 1
        self._settle(move, "moved")

    def _settle(self, move: Handover, outcome: str) -> MigrationRecord:
        if self._move is move:
            self._move = None
        return move.settle(outcome)

    def _close(self) -> None:
        """Stop generating everywhere and leave nothing pinned."""
        self._closed = True
        if self._segment is not None:
            self._segment.stream.close()
        if (move := self._move) is not None:
            move.abandon()
            self._settle(move, "finished_first" if self._finished else "cancelled")
        self._free_holder()
