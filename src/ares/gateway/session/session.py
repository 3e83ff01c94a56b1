"""One generated output: prefill, decode and all migrations and suspensions, as one unbroken stream of tokens."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.delta import Delta, EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import Instance
from ares.gateway.session.eligibility import why_ineligible
from ares.gateway.session.handover import HandoverState, MigrationRecord, NotMovableError
from ares.gateway.session.handovers import CutWithoutHandoverError, Handovers
from ares.gateway.session.length_features import LengthFeatures
from ares.gateway.session.objectives import ORDINARY, Objective
from ares.gateway.session.output import Emit, Output, Relay
from ares.gateway.session.pending_call import PendingCall, is_unresponsive
from ares.gateway.session.phase import Phase
from ares.gateway.session.pinned_kv import PinnedKV
from ares.gateway.session.placement import Placement
from ares.gateway.session.segment import Segment
from ares.gateway.tracing.span import NO_SPAN, Span
from ares.gateway.tuning import DEFAULT, Tuning
from ares.protocol.fields import MIGRATED, CutOutcome, RequestState
from ares.protocol.messages import Row

# Tokens after which a loss counts no more: a request that breaks every instance does not get so far.
_OUTLIVED_TOKENS = 64


class InstanceSelector(Protocol):
    """Chooses instances for sessions."""

    def choose_prefill(self, placement: Placement, destination: Instance | None) -> Instance | None:
        """Return the instance to prefill on; None where `destination`, which is to decode, computes the prompt itself.

        `destination` is None where no decode instance has been chosen yet.
        """
        ...

    def prefill_ended(self, placement: Placement, instance: Instance, cached_tokens: int | None) -> None:
        """Note that a chosen instance has answered, and how much of the prompt it had cached; None: it failed."""
        ...

    def decode_began(self, placement: Placement, instance: Instance) -> None:
        """Note that the first tokens have come from where it decodes."""
        ...

    async def admit(self, session: "Session", exclude: set[str]) -> Instance:
        """Wait until the session is admitted to decode, and return where; NoInstanceError where none takes it."""
        ...


class Session:
    """One choice of a request, from its arrival to its last token.

    `run` drives it; other tasks may call `hand_over` and `suspend` meanwhile.

    Parameters
    ----------
    id, prompt, sampling, objective
        What is generated. The id is that of the request in the gateway.
    selector
        Chooses its instances.
    handover_timeout_s
        Longest hand-over, and longest answer of a source to a cut.
    on_phase
        Called whenever `phase` has changed, and when the first tokens come from where it decodes.
    gateway
        Name of its gateway, with which all its keys begin.
    maximum_attempts
        Bounds the instances that are tried for one step, and the losses of its instance, before the client gets an
        error.
    tuning
        The gateway's times and limits.
    length_features
        What is known of it; None: nothing.
    span
        Of its request, which its steps hang below.

    Attributes
    ----------
    phase
        Its phase, from arrival to its last token.
    destination
        Where it was admitted to, until it runs there.
    output
        What its client has been given.
    placement
        How it gets onto instances; has the KV that is pinned for it and the answer that it waits for.
    arrived_at, waiting_since, moved_at
        When it arrived, last began to wait for admission, and last moved: times of `time.monotonic`, 0 for what has not
        happened.
    commanded_until
        Until then it stays where an operator has moved it, unless memory runs out there.
    moves, suspensions
        How often it was moved and was suspended.
    losses
        How often it has lost its instance, without those that it has outlived for `_OUTLIVED_TOKENS` tokens.
    precopy_target
        Where its KV goes ahead of a hand-over (gateway/session/precopy.py).
    copied_to, copy_after
        Where its newest warm copy went (gateway/control/warm_copies.py), and when the next one may begin: a time of
        `time.monotonic`, infinite while one is under way.
    predicted
        The newest prediction of what it will still generate, and how many tokens it had then.
    """

    def __init__(
        self,
        id: str,  # noqa: A002 - a request's, as everywhere
        prompt: list[int],
        sampling: Sampling,
        selector: InstanceSelector,
        handover_timeout_s: float,
        objective: Objective = ORDINARY,
        *,
        on_phase: Callable[["Session"], None] = lambda _: None,
        gateway: str = "gateway",
        maximum_attempts: int = 3,
        tuning: Tuning = DEFAULT,
        length_features: LengthFeatures | None = None,
        span: Span = NO_SPAN,
    ) -> None:
        self.id = id
        self.length_features = length_features if length_features is not None else LengthFeatures()
        self.tuning = tuning
        self.prompt = prompt
        self.sampling = sampling
        self.objective = objective
        self.handover_timeout_s = handover_timeout_s
        self.maximum_attempts = maximum_attempts
        self.phase = Phase.PREFILL
        self.destination: Instance | None = None
        self.output = Output()
        self.placement = Placement(
            prompt=prompt,
            sampling=sampling,
            output=self.output,
            choose_prefill=selector.choose_prefill,
            prefill_ended=selector.prefill_ended,
            gateway=gateway,
            maximum_attempts=maximum_attempts,
            pinned_kv=PinnedKV(tuning.pinned_kv_kept_s),
            pending_call=PendingCall(tuning.alive_s),
            span=span,
        )
        self.span = span
        self.arrived_at = time.monotonic()
        self.waiting_since = self.moved_at = self.commanded_until = 0.0
        self.moves = self.suspensions = self.losses = 0
        # How many tokens there were at the newest loss.
        self._lost_at = 0
        self.precopy_target: Instance | None = None
        self.copied_to: Instance | None = None
        self.copy_after = 0.0
        self.predicted: tuple[tuple[float, float, float], int] | None = None
        self._selector = selector
        self._on_phase = on_phase
        self._segment: Segment | None = None
        # Tokens of the segment have come and it has not ended.
        self._streaming = False
        self._handovers = Handovers(id, self.placement, handover_timeout_s, tuning)
        # A suspension is under way.
        self._suspending = False
        # A suspension found nothing to cut, since the instance did not run it, and has closed its stream instead.
        self._withdrawn = False
        # The segment that `abort_on` has broken off: its end does not count as a loss.
        self._aborted: Segment | None = None
        self._closed = False

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
    def emitted(self) -> list[int]:
        """Output tokens so far."""
        return self.output.tokens

    @property
    def tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.prompt) + len(self.output.tokens)

    @property
    def waits(self) -> bool:
        """Whether it waits for its next token outside decode, be it in the own queue of an instance."""
        return self.phase is not Phase.DECODE or not (self._streaming or self._handovers.current)

    @property
    def moving(self) -> bool:
        """Whether a hand-over, or a copy ahead of one, is under way."""
        return self._handovers.current is not None or self.precopy_target is not None

    @property
    def incoming(self) -> Instance | None:
        """The instance that a hand-over is bringing it to."""
        handover = self._handovers.current
        return handover.target if handover and self._segment is handover.source else self.precopy_target

    def unmovable_now(self) -> str | None:
        """Return why it cannot be moved now, in one word; None where it can."""
        if self.sampling.unmovable_reason is not None:
            return self.sampling.unmovable_reason
        if self.output.finished or self._closed:
            return "finished" if self.output.finished else "cancelled"
        if not self._streaming:
            return "not_decoding"
        if self._suspending:
            return "suspending"
        return "moving" if self.moving else None

    def works_on(self, instance: Instance) -> bool:
        """Whether an instance does something for it."""
        return self.instance is instance or self.placement.pending_call.instance is instance

    # --- supervision ---

    def overdue(self, rows: Mapping[str, Row]) -> str | None:
        """Return a name of what is overdue by the instances' reports, the same until it arrives; None: nothing is.

        Overdue may be KV that a pull brings, tokens that the instance has generated, or any answer of one that has
        nothing of the session (any more): a network may lose a connection silently.

        Parameters
        ----------
        rows
            The newest row of every request of every instance, by key.
        """
        segment = self._segment
        instance = segment.instance if segment is not None else self.placement.pending_call.instance
        if instance is None or not instance.health.healthy:
            return None
        key = segment.key if segment is not None else self.placement.newest_key
        row = rows.get(key)
        if row is not None and row.state == RequestState.LOADING:
            return f"KV of {key}"
        if segment is not None and not segment.stream.starved:  # the client does not read
            return None
        received = len(self.emitted) - segment.base if segment is not None else 0
        return f"token {received} of {key}" if row is None or row.output > received else None

    def supervise(self, overdue_s: float) -> None:
        """Stop waiting for an instance that has frozen, or for what has been overdue for so long."""
        pending = self.placement.pending_call
        pending.give_up_if_frozen()
        segment, longest, last_token_at = self._segment, 2 * self.handover_timeout_s, self.output.last_token_at
        # Telemetry may be old or wrong: a session that gets tokens waits for nothing.
        stuck = overdue_s > longest and time.monotonic() - last_token_at > longest
        if segment is not None and (stuck or is_unresponsive(segment.instance, last_token_at, self.tuning.alive_s)):
            segment.stream.close()
        elif segment is None and stuck and (asked := pending.instance) is not None:
            pending.give_up(asked)

    def abort_on(self, instance: Instance) -> None:
        """Abort what it does on an instance: it resumes elsewhere from its tokens, or fails where it cannot."""
        self.placement.pending_call.give_up(instance)
        if self._segment is not None and self._segment.instance is instance:
            self._aborted = self._segment
            self._aborted.stream.close()

    # --- the run ---

    async def run(self, emit: Emit) -> None:
        """Generate the whole output, giving every token to `emit` exactly once and in order.

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
                    complete = await self._relay(segment, emit)
                    self._end_span(segment)
                    if complete:
                        return
                    suspended = self._suspending
                    following = None if suspended else await self._handovers.follow(segment)
                except EngineLostError as error:
                    suspended = self._withdrawn
                    self._end_span(segment, None if suspended or segment is self._aborted else error)
                    following = None if suspended else await self._recover(segment, error, emit)
                except EngineRefusedError as error:
                    self._end_span(segment, error)
                    raise
                segment = await self._resume(emit) if suspended else following
        finally:
            self._close()

    def _end_span(self, segment: Segment, failure: Exception | None = None) -> None:
        """End the span of a segment that generates no more."""
        segment.span.set({"gen_ai.usage.completion_tokens": len(self.emitted) - segment.base})
        segment.span.end(failure)

    async def _start(self, emit: Emit) -> Segment | None:
        """Prefill, wait for admission, and start decode; None where the first token is the last.

        The first token is delivered only when the session has been admitted, so that no pause follows it in the stream.
        """
        first, kv_transfer_params = await self._prefill()
        if first is not None and first.finish_reason is not None:
            await self.output.deliver([first], emit)
            return None
        try:
            async with asyncio.timeout(self.tuning.pinned_kv_kept_s):
                instance = await self._admit(set())
        except TimeoutError:
            # The instance's lease on the KV ends soon. The client has no token yet: it is prefilled again when there is
            # room.
            self.placement.pinned_kv.free()
            instance = await self._admit(set())
            self._enter(Phase.PREFILL)
            first, kv_transfer_params = await self._prefill(instance)
        if first is not None and await self.output.deliver([first], emit):
            return None
        return await self._start_decode(instance, kv_transfer_params)

    async def _resume(self, emit: Emit) -> Segment | None:
        """Wait for admission, prefill what there is so far, and start; None where the next token is the last."""
        self._segment, self._suspending, self._withdrawn = None, False, False
        self._enter(Phase.SUSPENDED)
        self.placement.pinned_kv.free()
        instance = await self._admit(set())
        first, kv_transfer_params = await self._prefill(instance)
        if first is not None and await self.output.deliver([first], emit):
            return None
        return await self._start_decode(instance, kv_transfer_params)

    async def _prefill(self, destination: Instance | None = None) -> tuple[Delta | None, dict[str, Any] | None]:
        """Compute the tokens so far and the next one; return it and what the decode instance needs to pull the KV."""
        first, kv_transfer_params, predicted = await self.placement.prefill(destination)
        if predicted is not None:
            self.predicted = (predicted, self.tokens)
        return first, kv_transfer_params

    async def _admit(self, exclude: set[str]) -> Instance:
        """Wait until it may decode, and return where: on no instance of these names."""
        resumes = self.phase is Phase.SUSPENDED
        if not resumes:
            self._enter(Phase.WAITING)
        self.waiting_since = time.monotonic()
        with self.span.child("suspended" if resumes else "admission", {"ares.tokens": self.tokens}) as waiting:
            self.destination = await self._selector.admit(self, exclude)
            waiting.set({"ares.instance": self.destination.name})
        self._enter(Phase.PREFILL if resumes else Phase.STARTING)
        return self.destination

    async def _start_decode(self, instance: Instance, kv_transfer_params: dict[str, Any] | None) -> Segment:
        """Start, or resume from the tokens so far, on this decode instance or on another one."""
        self._enter(Phase.STARTING)
        segment = await self.placement.start_decode(instance, kv_transfer_params, self._admit)
        self.destination = None
        self._enter(Phase.DECODE)
        return segment

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._on_phase(self)

    async def _relay(self, segment: Segment, emit: Emit) -> bool:
        """Deliver the tokens of a segment's stream.

        Returns
        -------
        True where the output is complete, False where the segment was cut, for a hand-over or a suspension.
        """
        arriving = self._handovers.current
        relay = Relay(segment.stream, self.output, emit)
        try:
            async with asyncio.timeout(self.handover_timeout_s if arriving else None) as limit:
                while batch := await relay.next():
                    if arriving is not None:
                        # The first tokens after a hand-over: it has worked.
                        limit.reschedule(None)
                        self.moved_at = time.monotonic()
                        arriving.record.stall_s = self.moved_at - self.output.last_token_at
                        self.moves += 1
                        self._handovers.end(arriving, HandoverState.MOVED)
                        arriving = None
                    if not self._streaming:
                        self._streaming = True
                        self._on_phase(self)
                        self._selector.decode_began(self.placement, segment.instance)
                    last = batch[-1]
                    if last.finish_reason == "abort":
                        raise EngineLostError("the instance aborted the request")
                    cut = last.stop_reason == MIGRATED
                    if cut:
                        last.finish_reason = last.stop_reason = None
                    last.name_repetition()
                    if await self.output.deliver(batch, emit):
                        return True
                    if cut:
                        return False
        except TimeoutError:
            raise EngineLostError("no token after the hand-over in time") from None
        except EngineRefusedError as error:
            if not self._streaming:
                # vLLM checks some parameters only after it has accepted the stream: nothing of it ran, or pulled.
                self.placement.pinned_kv.put_back(segment.pin)
            if error.status < 500:
                raise
            raise EngineLostError(str(error)) from error
        finally:
            self._streaming = False
            self.output.step_tokens += segment.stream.early_tokens
            relay.close()
            segment.stream.close()
        return True

    async def _recover(self, lost: Segment, error: EngineLostError, emit: Emit) -> Segment | None:
        """Resume from the tokens after a loss; None where the output is complete.

        There are three cases: where a hand-over was under way and the source broke off after the cut, at its target;
        where the instance still takes work, there; or anywhere, as after a suspension.
        """
        handover, source = self._handovers.current, lost.instance
        self._suspending = False
        if handover is not None:
            source = handover.source.instance
            missing = self._handovers.missing_after_loss(lost)
            if missing is not None:
                # What the source had generated is not generated again.
                if missing and await self.output.deliver([Delta(token_ids=missing)], emit):
                    return None
                try:
                    return await self._handovers.follow(lost)
                except EngineLostError as second:
                    error = second
            self._handovers.end(handover, HandoverState.RETURNED)
        elif lost is not self._aborted and not isinstance(error, CutWithoutHandoverError):
            lost.instance.health.connection_failed()
            outlived = (len(self.emitted) - self._lost_at) // _OUTLIVED_TOKENS
            self.losses, self._lost_at = max(0, self.losses - outlived) + 1, len(self.emitted)
        self.placement.pinned_kv.free()
        self._check_resumable(error)
        self._segment = None
        # The source still has the full blocks of this session in its prefix cache.
        if source.takes("decode") and why_ineligible(self.placement, source.state, None) is None:
            return await self._start_decode(source, None)
        return await self._resume(emit)

    def _check_resumable(self, error: EngineLostError) -> None:
        """Raise EngineLostError where the output cannot be continued exactly, or was lost too often."""
        reason = self.sampling.unmovable_reason
        if reason is not None and self.emitted:
            raise EngineLostError(f"{error}; {reason} cannot be resumed exactly") from error
        if self.losses > self.maximum_attempts:
            raise EngineLostError(f"lost {self.losses} times, the last time: {error}") from error

    def _close(self) -> None:
        """Stop generating everywhere and leave nothing pinned."""
        self._closed = True
        if self._segment is not None:
            self._segment.stream.close()
            self._end_span(self._segment)
        if (handover := self._handovers.current) is not None:
            outcome = HandoverState.FINISHED_FIRST if self.output.finished else HandoverState.CANCELLED
            self._handovers.end(handover, outcome)
        self.placement.pinned_kv.close()

    # --- moves and suspensions ---

    async def hand_over(self, target: Instance, reason: str) -> MigrationRecord:
        """Continue on `target`, and return how that went; the stream of tokens is not interrupted.

        Raises
        ------
        NotMovableError
            It cannot be moved now; nothing was changed.
        """
        return await self._handovers.hand_over(self._movable_segment(), target, reason)

    async def suspend(self) -> str:
        """Stop generating and give the KV up until it is admitted again; return how that went, in one word.

        A request that its instance has preempted is taken out of the queue there.

        Raises
        ------
        NotMovableError
            It cannot be cut now; nothing was changed.
        """
        source = self._movable_segment()
        self._suspending = True
        try:
            cut = await source.instance.control.cut(source.key, self.handover_timeout_s)
        except TimeoutError:
            if self._segment is source:  # if it is cut after all, it resumes from its tokens
                self._suspending = False
            return "source_silent"
        if cut.outcome == CutOutcome.NOT_RUNNING and self._segment is source and self._handovers.current is None:
            self._withdrawn = True
            self.suspensions += 1
            source.stream.close()
            return "withdrawn"
        if cut.outcome != CutOutcome.PINNED:
            self._suspending = False
            return cut.outcome
        self.suspensions += 1
        # It will not be pulled: where it resumes, its tokens are prefilled again.
        await source.instance.control.release(source.key)
        return "suspended"

    def _movable_segment(self) -> Segment:
        """Return what generates it now; NotMovableError where it cannot be moved."""
        refusal, segment = self.unmovable_now(), self._segment
        if refusal is not None or segment is None:
            raise NotMovableError(refusal or "not_decoding")
        return segment
