"""The record of a move, and its state while it is under way."""

import asyncio
import time
from dataclasses import dataclass, field, replace

from ares.gateway.pool.generate import EngineLostError, Stream
from ares.gateway.pool.instance import Instance
from ares.policy.transfer import KEPT_S, STOP_AND_COPY, Mode
from ares.protocol import messages


class NotMovableError(Exception):
    """The request cannot be moved now; `reason` says why in one word."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the request cannot be moved: {reason}")
        self.reason = reason


class HandoverError(Exception):
    """The hand-over did not come about."""


class UntakenError(EngineLostError):
    """The source has ended the request for a hand-over that does not come about; it is well itself."""


@dataclass(slots=True)
class MigrationRecord:
    """How a move went.

    Attributes
    ----------
    outcome
        `moved`; `returned`: the target did not take it and it went on elsewhere from its tokens;
        `finished_first`: it ended by itself; `not_running`: nothing of it was in flight; `source_silent`: the
        source did not answer; `cancelled`: the client left; `not_copied`: the copy ahead failed, and the request was
        left where it is; `moving` until one of these.
    mode
        `stop_and_copy`, or `pre_copy`: the KV of `precopied_tokens` was pulled ahead, in `precopy_s`.
    stall_s
        Seconds between the last token relayed from the source and the first from the target.
    pulled_tokens
        Tokens whose KV the target took from the source; the rest it computed.
    cut_s, accept_s, queued_s
        Parts of the move: order to the source until it has ended the request; from there until the target's server
        has accepted it; wait for a scheduling step of the target.
    """

    request_id: str
    source: str
    target: str
    reason: str
    outcome: str = "moving"
    mode: Mode = STOP_AND_COPY
    stall_s: float | None = None
    pulled_tokens: int | None = None
    cut_s: float | None = None
    accept_s: float | None = None
    queued_s: float | None = None
    precopied_tokens: int = 0
    precopy_s: float | None = None
    started_at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Pin:
    """KV that an instance keeps under `key` until somebody pulls it.

    `since` numbers our subscription there, `pinned_at` is on the clock of `time.monotonic`.
    """

    instance: Instance
    key: str
    since: int
    pinned_at: float = field(default_factory=time.monotonic)

    @classmethod
    def at(cls, instance: Instance, key: str) -> "Pin":
        """Return what is, or will be, pinned from now on."""
        return cls(instance, key, instance.subscription.number)

    def now(self) -> "Pin":
        """Return what was to be pinned, and has just been."""
        return replace(self, pinned_at=time.monotonic())

    @property
    def kept(self) -> bool:
        """Whether it is certain that the instance has not let go of it."""
        return time.monotonic() - self.pinned_at <= KEPT_S and self.instance.subscription.unbroken(self.since)


@dataclass(slots=True)
class Segment:
    """What one instance generates of a sequence.

    `base` is the length of the output before it, `pin` the KV that it pulls.
    """

    instance: Instance
    key: str
    base: int
    stream: Stream
    pin: Pin | None = None


class Handover:
    """A hand-over under way: first the source's `Handover` becomes known, then the target's `Segment`."""

    def __init__(self, source: Segment, target: Instance, record: MigrationRecord) -> None:
        self.source = source
        self.target = target
        self.record = record
        self.handover: asyncio.Future[messages.CutResult] = asyncio.get_running_loop().create_future()
        self.arrival: asyncio.Future[Segment] = asyncio.get_running_loop().create_future()
        # Everything that the source generated has been relayed.
        self.relayed = asyncio.Event()
        self.settled = asyncio.Event()

    @property
    def cut(self) -> messages.CutResult | None:
        """The source's hand-over, once it is known."""
        known = self.handover.done() and self.handover.exception() is None
        return self.handover.result() if known else None

    def missing(self, emitted: int) -> list[int] | None:
        """Tokens that the source generated and its stream has not brought yet; None where they are not known."""
        cut = self.cut
        if cut is None:
            return None
        count = self.source.base + cut.output_tokens - emitted
        if count > len(cut.tail):
            return None
        return list(cut.tail[-count:]) if count > 0 else []

    def abandon(self) -> None:
        """End what the target has begun: nobody takes its tokens."""
        if self.arrival.done() and self.arrival.exception() is None:
            self.arrival.result().stream.close()

    def fail(self, error: Exception) -> None:
        """Say that the target does not take it."""
        if not self.arrival.done():
            self.arrival.set_exception(error)
            self.arrival.exception()  # it may never be asked for

    def settle(self, outcome: str) -> MigrationRecord:
        """End the move, once; whoever still waits for a part of it is told."""
        if not self.settled.is_set():
            self.record.outcome = outcome
            self.settled.set()
        self.relayed.set()
        for future in (self.handover, self.arrival):
            if not future.done():
                future.set_exception(HandoverError(outcome))
                future.exception()  # it may never be asked for
        return self.record
