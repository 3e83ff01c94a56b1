"""Graceful shutdown of a gateway: no new requests; running ones go on until a deadline, then end with an error."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)

_CHECK_S = 0.05
# By then, sessions that were ended have sent their errors and left their engines.
_ERRORS_S = 1.0


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
        self._over = False
        self._running: set[asyncio.Timeout] = set()

    def check(self) -> None:
        """Raise ShuttingDownError where new requests are refused."""
        if self.begun:
            raise ShuttingDownError("the gateway is shutting down and takes no new requests")

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`; ShuttingDownError where it does not end before the deadline."""
        limit = asyncio.timeout(0.0 if self._over else None)
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
        logger.info("shutting down; %d sessions run, and have %g s", len(self._running), deadline_s)
        await self._wait(deadline_s, force)
        self._over = True
        if self._running:
            logger.warning("%d sessions are ended before they are complete", len(self._running))
            for limit in self._running:
                limit.reschedule(0.0)
            await self._wait(_ERRORS_S, lambda: False)

    async def _wait(self, most_s: float, stop: Callable[[], bool]) -> None:
        """Return when nothing runs any more, after this time, or when `stop` returns True."""
        loop = asyncio.get_running_loop()
        until = loop.time() + most_s
        while self._running and loop.time() < until and not stop():  # noqa: ASYNC110 - a signal sets no event
            await asyncio.sleep(_CHECK_S)
