"""Graceful shutdown of a gateway: no new requests; running ones may finish until a deadline, then end with an error."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)

_POLL_S = 0.05
# For sessions that were ended to send their errors, and to abort at their engines.
_SEND_ERRORS_S = 1.0


class ShuttingDownError(Exception):
    """The gateway shuts down: it takes no new requests, or ends those that still run."""

    code = "shutting_down"


class Shutdown:
    """The running sessions, and how they end.

    Attributes
    ----------
    begun
        Whether new requests are refused.
    """

    def __init__(self) -> None:
        self.begun = False
        self._deadline_passed = False
        self._running: set[asyncio.Timeout] = set()

    def check(self) -> None:
        """Raise ShuttingDownError where new requests are refused."""
        if self.begun:
            raise ShuttingDownError("the gateway is shutting down and takes no new requests")

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`; ShuttingDownError where it does not end before the deadline."""
        limit = asyncio.timeout(0.0 if self._deadline_passed else None)
        try:
            async with limit:
                self._running.add(limit)
                await work
        except TimeoutError:
            if not limit.expired():
                raise
            raise ShuttingDownError("the gateway was shut down before the output was complete") from None
        finally:
            self._running.discard(limit)

    async def drain(self, deadline_s: float, force: Callable[[], bool]) -> None:
        """Refuse new requests, and return when nothing runs any more; sessions still running at the deadline are ended.

        Parameters
        ----------
        deadline_s
            Seconds from now.
        force
            Whether to end everything now.
        """
        self.begun = True
        logger.info("shutting down: %d sessions run, and have %g s to finish", len(self._running), deadline_s)
        await self._wait(deadline_s, force)
        self._deadline_passed = True
        if self._running:
            logger.warning("%d sessions did not finish in time and are ended with an error", len(self._running))
            for limit in self._running:
                limit.reschedule(0.0)
            await self._wait(_SEND_ERRORS_S, lambda: False)

    async def _wait(self, timeout_s: float, stop: Callable[[], bool]) -> None:
        """Return when nothing runs any more, after this time, or when `stop` returns True."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while self._running and loop.time() < until and not stop():  # noqa: ASYNC110 - a signal sets no event
            await asyncio.sleep(_POLL_S)
