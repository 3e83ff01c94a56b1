"""Drives the hand-overs of a session, one at a time: asks source and target, and follows the request to its target."""

import asyncio
from typing import Any

from ares.gateway.pool.delta import EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import Instance
from ares.gateway.session.handover import Handover, HandoverError, HandoverState, MigrationRecord
from ares.gateway.session.placement import Placement
from ares.gateway.session.segment import Segment
from ares.gateway.tuning import Tuning
from ares.protocol.fields import CutOutcome


class CutWithoutHandoverError(EngineLostError):
    """The source has ended the request for a hand-over that did not follow; the source itself is healthy."""


class Handovers:
    """The hand-overs of a session.

    Parameters
    ----------
    request_id
        Of the request in the gateway.
    placement
        How the session gets onto instances.
    timeout_s
        Longest hand-over, and longest answer of a source to a cut.

    Attributes
    ----------
    current
        The one that is under way.
    """

    def __init__(self, request_id: str, placement: Placement, timeout_s: float, tuning: Tuning) -> None:
        self.current: Handover | None = None
        self._request_id = request_id
        self._placement = placement
        self._timeout_s = timeout_s
        self._tuning = tuning

    # --- what the move does ---

    async def hand_over(self, source: Segment, target: Instance, reason: str) -> MigrationRecord:
        """Move what generates the output to `target`, and return how that went."""
        record = MigrationRecord(self._request_id, source.instance.name, target.name, reason)
        handover = self.current = Handover(source, target, record)
        key = self._placement.next_key()
        if target.state.hello is not None and target.state.hello.expects:
            await target.control.expect(key, self._tuning.expect_s)
        kv_transfer_params = await self._cut_source(handover)
        if kv_transfer_params is None:
            return record
        if self.missing(handover) is None:
            await handover.until_source_relayed()
        if handover.ended:
            return record
        await self._start_target(handover, kv_transfer_params, key)
        await handover.until_ended()
        if handover.state is HandoverState.MOVED:
            received = await target.control.until_kv_received(key, self._tuning.report_lag_s)
            if received is not None:
                record.pulled_tokens, record.queued_s = received.pulled, received.queued_s
        return record

    async def _cut_source(self, handover: Handover) -> dict[str, Any] | None:
        """Let the source end the request and pin its KV; return how to pull it, None where the hand-over is over."""
        source = handover.source
        try:
            cut = await source.instance.control.cut(source.key, self._timeout_s)
        except TimeoutError:
            # If the cut happens after all, the stream ends early and the session resumes from its tokens.
            self.end(handover, HandoverState.SOURCE_SILENT)
            return None
        if cut.outcome != CutOutcome.PINNED:
            not_running = cut.outcome == CutOutcome.NOT_RUNNING
            self.end(handover, HandoverState.NOT_RUNNING if not_running else HandoverState.FINISHED_FIRST)
            return None
        if handover.ended:  # the client left, or the source died
            await source.instance.control.release(source.key)
            return None
        self._placement.pinned_kv.add(source.instance, source.key)
        handover.note_cut(cut)
        return cut.kv_transfer_params

    async def _start_target(self, handover: Handover, kv_transfer_params: dict[str, Any], key: str) -> None:
        """Ask the target to continue the request, under `key`."""
        target = handover.target
        handover.ask()
        try:
            async with asyncio.timeout(self._timeout_s):
                tokens = self._placement.output.tokens + (self.missing(handover) or [])
                segment = await self._placement.open(target, tokens, kv_transfer_params, key)
        except (EngineLostError, EngineRefusedError, TimeoutError) as error:
            if not isinstance(error, EngineRefusedError):
                target.health.connection_failed()
            handover.refuse(error)
            return
        if not handover.accept(segment):
            segment.stream.close()
            segment.span.end()

    # --- what the session's run does ---

    def missing(self, handover: Handover) -> list[int] | None:
        """Return the tokens of the source that the client does not have; None where they are not known."""
        return handover.missing(len(self._placement.output.tokens))

    def missing_after_loss(self, lost: Segment) -> list[int] | None:
        """Return tokens of a source that broke off after the cut, for the client to get from the source's answer.

        None where it is not the source that was lost, or not all that it generated is known.
        """
        handover = self.current
        if handover is None or lost is not handover.source or handover.source_relayed:
            return None
        missing = self.missing(handover)
        # The answer has no log probabilities.
        return None if missing and self._placement.sampling.parameters.get("logprobs") is not None else missing

    async def follow(self, source: Segment) -> Segment:
        """Return the segment that continues one which was cut.

        Raises
        ------
        CutWithoutHandoverError
            No hand-over followed the cut in time.
        EngineLostError
            The target did not take the request.
        """
        handover = self.current
        try:
            if handover is None:
                raise HandoverError("no hand-over is under way")
            async with asyncio.timeout(self._tuning.report_lag_s):
                await handover.until_cut()
        except (HandoverError, TimeoutError) as error:
            # Cut and pinned, but how to pull it is not known in time.
            self._placement.pinned_kv.add(source.instance, source.key)
            raise CutWithoutHandoverError(f"the request was cut and no instance took it over: {error}") from error
        handover.note_source_relayed()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await handover.until_accepted()
        except (HandoverError, EngineLostError, EngineRefusedError, TimeoutError) as error:
            raise EngineLostError(f"the target did not take it: {error}") from error

    def end(self, handover: Handover, outcome: HandoverState) -> None:
        """End a hand-over, once."""
        if self.current is handover:
            self.current = None
        handover.end(outcome)
