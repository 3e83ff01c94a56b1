"""How a sequence gets onto instances: prefill first, then admission, then a stream of tokens from a decode instance."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.generate import Delta, EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import Instance, NoInstanceError
from ares.gateway.session.handover import Handover, Pin, Segment
from ares.gateway.session.objectives import Objective
from ares.gateway.session.pending_call import PendingCall, is_unresponsive
from ares.protocol.fields import RequestState
from ares.protocol.messages import Row

# Given new tokens; returns whether the output is complete (a stop string was found).
Emit = Callable[[list[Delta]], Awaitable[bool]]

Phase = Literal["prefill", "waiting", "starting", "decode", "suspended"]


class Placement(Protocol):
    """Chooses instances for a sequence."""

    def prefill(self) -> Instance | None:
        """Return the instance to prefill on; None where the decode instance shall do it."""
        ...

    async def admit(self, sequence: "Entering", exclude: set[str]) -> Instance:
        """Wait until the sequence may decode and return where; NoInstanceError where that does not come about."""
        ...


@dataclass(slots=True)
class Entering:
    """What a sequence is, where it runs, and how it gets there.

    Times are those of `time.monotonic`; 0 for what has not happened. `maximum_attempts` bounds the instances that are
    tried for one step, and the losses of its instance, before the client gets an error.
    """

    id: str
    prompt: list[int]
    sampling: Sampling
    placement: Placement
    handover_timeout_s: float
    objective: Objective = field(default_factory=Objective)
    on_phase: Callable[["Entering"], None] = lambda _: None
    """Called whenever `phase` has changed, and when the first tokens come from where it decodes."""
    gateway: str = "nobody"
    """Name of its gateway, with which all its keys begin."""
    maximum_attempts: int = 3
    emitted: list[int] = field(default_factory=list)
    phase: Phase = "prefill"
    destination: Instance | None = None
    """Where it was admitted to, until it runs there."""
    priority: int = 0
    """vLLM's priority: who is preempted first, largest first."""
    arrived_at: float = field(default_factory=time.monotonic)
    first_token_at: float = 0.0
    waiting_since: float = 0.0
    moved_at: float = 0.0
    rests_until: float = 0.0
    """Until then it stays where an operator has moved it, unless it must leave."""
    moves: int = 0
    suspensions: int = 0
    longest_gap_s: float = 0.0
    """Longest time between two of its tokens, whatever the reason."""
    copying: Instance | None = None
    """Where its KV goes ahead of a hand-over (gateway/session/precopy.py)."""
    predicted: tuple[tuple[float, float, float], int] | None = None
    """The newest prediction of what it will still generate, and how many tokens it had then."""
    _nonce: str = field(default_factory=lambda: uuid.uuid4().hex[:10])
    _segments: int = 0
    _segment: Segment | None = None
    _decoding: bool = False
    _finished: bool = False
    _closed: bool = False
    _losses: int = 0
    # The one that it was told to leave: that it breaks off is no loss.
    _left: Segment | None = None
    _last_token_at: float = 0.0
    _move: Handover | None = None
    # The KV that waits for this sequence, until somebody else has it.
    _holder: Pin | None = None
    _pausing: bool = False
    _withdrawn: bool = False
    _pending: PendingCall = field(default_factory=PendingCall)
    _background: set[asyncio.Task[Any]] = field(default_factory=set)

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
    def waits(self) -> bool:
        """Whether it waits outside decode: also where an instance has accepted it, and its own queue is long."""
        return self.phase != "decode" or not (self._decoding or self._move)

    def overdue(self, rows: Mapping[str, Row]) -> str | None:
        """Return what should have come by what instances report, in words that stay the same until it does; or None.

        That is KV that a pull brings, tokens that the instance has generated, or any answer of one that has nothing
        of the sequence (any more): a network may lose a connection without a word.

        Parameters
        ----------
        rows
            The newest row of every request of every instance, by key.
        """
        segment = self._segment
        instance = segment.instance if segment is not None else self._pending.instance
        if instance is None or not instance.health.healthy:
            return None
        key = segment.key if segment is not None else self._newest_key
        row = rows.get(key)
        if row is not None and row.state == RequestState.LOADING:
            return f"KV of {key}"
        if segment is not None and not segment.stream.starved:  # the client does not read
            return None
        received = len(self.emitted) - segment.base if segment is not None else 0
        return f"token {received} of {key}" if row is None or row.output > received else None

    def supervise(self, overdue_s: float) -> None:
        """Stop waiting for an instance that has frozen, or for what has been overdue for so long."""
        self._pending.give_up_if_frozen()
        segment, longest = self._segment, 2 * self.handover_timeout_s
        # Telemetry may be old or wrong: whoever gets tokens waits for nothing.
        stuck = overdue_s > longest and time.monotonic() - self._last_token_at > longest
        if segment is not None and (stuck or is_unresponsive(segment.instance, self._last_token_at)):
            segment.stream.close()
        elif segment is None and stuck and (asked := self._pending.instance) is not None:
            self._pending.give_up(asked)

    def works_on(self, instance: Instance) -> bool:
        """Whether an instance does something for it."""
        return self.instance is instance or self._pending.instance is instance

    def leave(self, instance: Instance) -> None:
        """Break off what it does on an instance: it goes on elsewhere from its tokens, or fails where it cannot."""
        self._pending.give_up(instance)
        if self._segment is not None and self._segment.instance is instance:
            self._left = self._segment
            self._left.stream.close()

    # --- getting onto instances ---

    async def _prefill(self) -> tuple[Delta | None, dict[str, Any] | None]:
        """Compute the tokens so far and the next one; return it and what the decode instance needs to pull the KV.

        Nothing is returned where the decode instance shall do it, or where its state must start there.
        """
        alone = self.sampling.maximum_tokens - len(self.emitted) == 1
        for _ in range(self.maximum_attempts):
            instance = self.placement.prefill()
            if instance is None or (self.emitted and instance.state.lacks(self.sampling.needs)):
                break
            key = self._next_key()
            if not alone:
                self._holder = Pin.at(instance, key)
            work = instance.engine.complete(self.sampling.prefill(key, self.prompt, self.emitted))
            try:
                delta, transfer = await self._pending.answer(instance, work)
                if delta.finish_reason == "abort":  # as an engine answers that is about to end
                    raise EngineLostError("the prefill instance aborted the request")
            except (EngineLostError, EngineRefusedError) as error:
                self._free_holder()
                instance.record_failure(error)
                continue
            self._holder = self._holder and self._holder.now()
            if (said := instance.control.predicted(key)) is not None:
                self.predicted = (said, self.tokens)
            if self.sampling.unmovable_reason is not None and not alone:
                return None, transfer
            if delta.finish_reason == "length" and not alone:
                delta.finish_reason = None
            return delta, transfer
        return None, None

    async def _admission(self, exclude: set[str]) -> Instance:
        """Wait for the place to decode."""
        resumes = self.phase == "suspended"
        if not resumes:
            self._turn("waiting")
        self.waiting_since = time.monotonic()
        self.destination = await self.placement.admit(self, exclude)
        self._turn("prefill" if resumes else "starting")
        return self.destination

    async def _enter(self, transfer: dict[str, Any] | None, prefer: Instance | None = None) -> Segment:
        """Start, or go on from the tokens so far, on a decode instance."""
        tried, asked = set[str](), set[str]()
        lost: Exception | None = None
        for _ in range(self.maximum_attempts):
            try:
                instance = prefer or await self._admission(tried)
            except NoInstanceError:
                if lost is None:
                    raise
                if isinstance(lost, EngineRefusedError):
                    break
                tried.clear()  # there is no other one, and what was lost may come back
                continue
            prefer = None
            self._turn("starting")
            try:
                segment = await self._pending.answer(instance, self._open(instance, self.emitted, transfer))
            except (EngineLostError, EngineRefusedError) as error:
                instance.record_failure(error)
                lost = error
                tried.add(instance.name)
                asked.add(instance.name)
            else:
                self.destination = None
                self._turn("decode")
                return segment
        raise EngineLostError(f"{len(asked)} instances in turn did not take it, the last one: {lost}") from lost

    async def _open(
        self, instance: Instance, emitted: list[int], transfer: dict[str, Any] | None, key: str | None = None
    ) -> Segment:
        """Start a segment; returns when the instance has accepted it."""
        key = key or self._next_key()
        if transfer is not None and (self._holder is None or not self._holder.kept):
            # Those blocks may be somebody else's by now; what is computed again is right. A client that does not read
            # may hold a sequence up for long.
            self._free_holder()
            transfer = None
        body = self.sampling.decode(key, self.prompt, emitted, transfer, self.priority)
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

    def _turn(self, phase: Phase) -> None:
        self.phase = phase
        self.on_phase(self)

    def _next_key(self) -> str:
        self._segments += 1
        return self._newest_key

    @property
    def _newest_key(self) -> str:
        return f"{self.gateway}/{self._nonce}/{self._segments}"

    async def _give(self, batch: list[Delta], emit: Emit) -> bool:
        for delta in batch:
            self.emitted += delta.token_ids or []
        now = time.monotonic()
        if self._last_token_at:
            self.longest_gap_s = max(self.longest_gap_s, now - self._last_token_at)
        self._last_token_at = now
        self.first_token_at = self.first_token_at or now
        stopped = await emit(batch)
        self._finished = stopped or batch[-1].finish_reason is not None
        return self._finished

    def _free_holder(self) -> None:
        if self._holder is not None:
            pin, self._holder = self._holder, None
            task = asyncio.ensure_future(pin.instance.control.release(pin.key))
            self._background.add(task)
            task.add_done_callback(self._background.discard)
