"""Live pre-copy: the full blocks of a running request go to its target while it still runs; then it is handed over.

The source pins the blocks (`messages.Copy`), and a request that is only there to pull KV brings them into the target's
prefix cache. The hand-over that follows is the ordinary one (gateway/session/handovers.py): it pulls what the prefix
cache lacks. Should the blocks have been evicted meanwhile, that is everything.
"""

import asyncio
import itertools
import time
from typing import Literal, NamedTuple

from ares.gateway.openai.sampling import precopy_request
from ares.gateway.pool.delta import EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.stream import Stream
from ares.gateway.session.handover import HandoverError, MigrationRecord, NotMovableError
from ares.gateway.session.pinned_kv import Pin
from ares.gateway.session.session import Session
from ares.gateway.tracing.calls import call_span
from ares.gateway.tracing.span import NO_SPAN, Span
from ares.policy.transfer import PRE_COPY, STOP_AND_COPY, Link, Mode, choose_mode

WantedMode = Literal["auto", "stop_and_copy", "pre_copy"]
AUTO: WantedMode = "auto"
_numbers = itertools.count(1)


def resolve_mode(wanted: WantedMode, session: Session, target: Instance) -> Mode:
    """Return the mode of a migration, wanted or forecast; without a prefix cache at the target, no pre-copy."""
    if (
        wanted == STOP_AND_COPY
        or target.state.hello is None
        or target.state.telemetry is None
        or not target.state.hello.prefix_caching
    ):
        return STOP_AND_COPY
    if wanted == PRE_COPY:
        return PRE_COPY
    link = Link(
        token_bytes=target.state.hello.token_bytes,
        bytes_per_s=target.state.telemetry.pull_bytes_per_s,
        within_step_bytes=target.state.hello.pull_within_step_bytes,
        step_s=target.state.telemetry.step_time_s,
        block_tokens=target.state.hello.block_size,
    )
    return choose_mode(session.tokens, link)


async def migrate(
    session: Session, target: Instance, reason: str, mode: Mode, timeout_s: float, span: Span = NO_SPAN
) -> MigrationRecord:
    """Migrate `session` to `target`, in pre-copy mode with its full blocks ahead, and return how it went.

    `span` is that of the move.

    Raises
    ------
    NotMovableError
        It cannot be moved now; nothing was changed.
    """
    refusal = session.unmovable_now()
    source = session.instance
    if refusal is not None or source is None:
        raise NotMovableError(refusal or "not_decoding")
    if mode == STOP_AND_COPY:
        return await session.hand_over(target, reason)
    record = MigrationRecord(session.id, source.name, target.name, reason, mode=mode)
    started = time.monotonic()
    precopied, failed = 0, False
    session.precopy_target = target
    try:
        precopied = (await copy_blocks(session, source, target, timeout_s, span)).pulled
    except (EngineLostError, EngineRefusedError, HandoverError, TimeoutError) as error:
        failed = True
        if isinstance(error, EngineLostError):
            target.health.connection_failed()
    finally:
        session.precopy_target = None
    copied_s = time.monotonic() - started
    ended = _ended(session, source)
    if failed or ended is not None:
        # Where the copy failed alone, the request has not been touched.
        record.outcome = ended or "not_copied"
    else:
        record = await session.hand_over(target, reason)
        record.mode = mode
    record.precopied_tokens, record.precopy_s = precopied, copied_s
    return record


def _ended(session: Session, source: Instance) -> str | None:
    """Return the outcome where there is nothing left to move: it has ended, or no longer runs at its source."""
    match session.unmovable_now():
        case None:
            return None if session.instance is source else "not_running"
        case "finished":
            return "finished_first"
        case "cancelled":
            return "cancelled"
        case _:
            return "not_running"


class Copied(NamedTuple):
    """A copy of full blocks: how many tokens the target has of them, and how many of these it has pulled now."""

    tokens: int = 0
    pulled: int = 0


async def copy_blocks(
    session: Session,
    source: Instance,
    target: Instance,
    timeout_s: float,
    span: Span = NO_SPAN,
    *,
    background: bool = False,
) -> Copied:
    """Bring the full blocks of `session`, which runs on `source`, into the prefix cache of `target`.

    In the background, every request of the target that waits for memory comes before it.

    Raises
    ------
    EngineLostError, EngineRefusedError
        The target died, or does not take it.
    HandoverError
        The pull failed, or the source may have freed the blocks.
    TimeoutError
        One of the two is silent.
    """
    key = session.key
    if key is None:
        return Copied()
    tokens = session.prompt + session.emitted
    pin = Pin.at(source, f"{key}/copy-{next(_numbers)}", session.tuning.pinned_kv_kept_s)
    # One token more than is copied: the target must compute something, and not what was copied.
    copied = await source.control.copy(key, pin.key, len(tokens) - 1, timeout_s)
    if not copied.tokens:
        return Copied()
    if not pin.kept:
        raise HandoverError("the source may have freed the copy")
    async with asyncio.timeout(timeout_s):
        ahead = tokens[: copied.tokens + 1]
        body = precopy_request(pin.key, ahead, copied.kv_transfer_params, session.sampling, background=background)
        with call_span(span, "precopy", target, pin.key, len(ahead)) as call:
            try:
                stream = await target.engine.stream(body, call.headers)
            except (EngineLostError, EngineRefusedError):
                # No pull has begun. In every other case the target's pull or abort frees the pin, as in a hand-over.
                await source.control.release(pin.key)
                raise
            try:
                pulled = await _wait_until_pulled(target, pin.key, stream, timeout_s)
                return Copied(copied.tokens, min(pulled, copied.tokens))
            finally:
                stream.close()


async def _wait_until_pulled(target: Instance, key: str, stream: Stream, timeout_s: float) -> int:
    """Wait until the KV is in the target's prefix cache; return how many tokens were pulled."""

    async def read_to_end() -> None:
        async for _ in stream.batches():
            pass

    ended = asyncio.ensure_future(read_to_end())
    received = asyncio.ensure_future(target.control.until_kv_received(key, timeout_s))
    try:
        await asyncio.wait((ended, received), return_when=asyncio.FIRST_COMPLETED)
        if not received.done():
            # The stream has ended or broken off: the report of what was pulled is on its way, or lost.
            await ended
        kv = await received
        if kv is None or kv.failed:
            # Not to be computed instead: that would cost the target the work that the copy should save.
            raise HandoverError("the pull failed")
        await ended
        return kv.pulled
    finally:
        for task in (ended, received):
            task.cancel()
        await asyncio.gather(ended, received, return_exceptions=True)
