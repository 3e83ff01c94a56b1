"""The hand-over of a running request from one decode instance to another: its states, and the record of how it went."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from ares.gateway.pool.instance import Instance
from ares.gateway.session.segment import Segment
from ares.policy.transfer import STOP_AND_COPY, Mode
from ares.protocol import messages


class NotMovableError(Exception):
    """The request cannot be moved now; `reason` is why, in one word."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the request cannot be moved: {reason}")
        self.reason = reason


class HandoverError(Exception):
    """The hand-over did not succeed."""


@dataclass(slots=True)
class MigrationRecord:
    """How a move went.

    Attributes
    ----------
    outcome
        `moved`; `returned`: the target did not take it, and it was resumed from its tokens;
        `finished_first`: it finished before; `not_running`: it did not run at the source; `source_silent`: the
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


class HandoverState(StrEnum):
    """State of a hand-over: which instance generates for the request. Final states are outcomes of the record."""

    CUTTING = "cutting"
    """The source has been asked to end the request, and generates until it does."""
    CUT = "cut"
    """The source has ended it and pinned its KV; no instance generates."""
    ASKED = "asked"
    """The target has been asked to continue it."""
    ACCEPTED = "accepted"
    """The target has accepted it and may generate; the client has none of its tokens yet."""
    REFUSED = "refused"
    """The target does not take it; no instance generates."""
    MOVED = "moved"
    RETURNED = "returned"
    FINISHED_FIRST = "finished_first"
    NOT_RUNNING = "not_running"
    SOURCE_SILENT = "source_silent"
    CANCELLED = "cancelled"


_S = HandoverState
# The client may leave, the output may be complete, and an instance may fail, in any state.
_AT_ANY_TIME = frozenset({_S.CANCELLED, _S.FINISHED_FIRST, _S.RETURNED})
TRANSITIONS: dict[HandoverState, frozenset[HandoverState]] = {
    _S.CUTTING: _AT_ANY_TIME | {_S.CUT, _S.NOT_RUNNING, _S.SOURCE_SILENT},
    _S.CUT: _AT_ANY_TIME | {_S.ASKED},
    _S.ASKED: _AT_ANY_TIME | {_S.ACCEPTED, _S.REFUSED},
    _S.ACCEPTED: _AT_ANY_TIME | {_S.MOVED},
    _S.REFUSED: _AT_ANY_TIME,
}
"""The states that may follow each; docs/migration.md has the picture."""


class Handover:
    """A hand-over under way.

    Two tasks drive it. `Handovers.hand_over` asks source and target: it goes from `CUTTING` to `ACCEPTED` or
    `REFUSED`. The session's run relays the source's tokens to the client, then the target's, and ends the hand-over.
    The target may generate before the source's last tokens have been relayed; `source_relayed` is whether they have.

    Attributes
    ----------
    cut
        The source's answer, once it has ended the request.
    segment
        What the target generates, once it has accepted the request.
    """

    def __init__(self, source: Segment, target: Instance, record: MigrationRecord) -> None:
        self.source = source
        self.target = target
        self.record = record
        self.state = HandoverState.CUTTING
        self.cut: messages.CutResult | None = None
        self.segment: Segment | None = None
        self.source_relayed = False
        self._refusal: Exception | None = None
        self._ordered_at = self._cut_at = time.monotonic()
        self._changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.state not in TRANSITIONS

    # --- what the move does ---

    def note_cut(self, cut: messages.CutResult) -> None:
        """Note that the source has ended the request."""
        self._advance(HandoverState.CUT)
        self.cut, self._cut_at = cut, time.monotonic()
        self.record.cut_s = self._cut_at - self._ordered_at

    def missing(self, emitted: int) -> list[int] | None:
        """Return the tokens of the source that have not been relayed, where the client has `emitted` output tokens.

        None where they are not known.
        """
        cut = self.cut
        if cut is None:
            return None
        count = self.source.base + cut.output_tokens - emitted
        if count > len(cut.tail):
            return None
        return list(cut.tail[-count:]) if count > 0 else []

    async def until_source_relayed(self) -> None:
        """Wait until the client has all tokens of the source, or the hand-over is over."""
        await self._until(lambda: self.source_relayed or self.ended)

    def ask(self) -> None:
        """Note that the target has been asked to continue the request."""
        self._advance(HandoverState.ASKED)

    def accept(self, segment: Segment) -> bool:
        """Note what the target generates; return whether it is in time: not where the hand-over is over."""
        if self.ended:
            return False
        self._advance(HandoverState.ACCEPTED)
        self.segment = segment
        self.record.accept_s = time.monotonic() - self._cut_at
        return True

    def refuse(self, error: Exception) -> None:
        """Note why the target does not take it."""
        if not self.ended:
            self._advance(HandoverState.REFUSED)
            self._refusal = error

    async def until_ended(self) -> None:
        """Wait until it is over."""
        await self._until(lambda: self.ended)

    # --- what the session's run does ---

    async def until_cut(self) -> None:
        """Wait until the source has ended the request; HandoverError where the hand-over is over before."""
        await self._until(lambda: self.cut is not None or self.ended)
        if self.cut is None:
            raise HandoverError(self.record.outcome)

    def note_source_relayed(self) -> None:
        """Note that the client has all tokens of the source."""
        self.source_relayed = True
        self._notify()

    async def until_accepted(self) -> Segment:
        """Wait for the target, and return what it generates.

        Raises
        ------
        HandoverError, EngineLostError, EngineRefusedError
            It does not take the request.
        """
        await self._until(lambda: self.segment or self._refusal or self.ended)
        if self.segment is None:
            raise self._refusal or HandoverError(self.record.outcome)
        return self.segment

    def end(self, outcome: HandoverState) -> None:
        """End it, once; unless the target has taken over, what it has begun is aborted."""
        if self.ended:
            return
        if outcome is not HandoverState.MOVED and self.segment is not None:
            self.segment.stream.close()
            self.segment.span.end()
        self._advance(outcome)
        self.record.outcome = outcome.value

    # --- states ---

    def _advance(self, state: HandoverState) -> None:
        if state not in TRANSITIONS.get(self.state, ()):
            raise RuntimeError(f"a hand-over does not go from {self.state} to {state}")
        self.state = state
        self._notify()

    async def _until(self, reached: Callable[[], object]) -> None:
        while not reached():
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
