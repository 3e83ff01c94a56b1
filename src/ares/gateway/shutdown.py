"""The orderly end of a gateway: nothing new, what runs goes on until a deadline, and the rest ends with a word why."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)

_LOOK_S = 0.05
# What was ended has said so to its client, and let go of its engines, by then.
_LAST_WORDS_S = 1.0


class ShuttingDownError(Exception):
    """The gateway is about to end: it takes nothing new, or finishes nothing more."""

    code = "shutting_down"


class Shutdown:
    """What runs, and how it comes to its end.

    Attributes
    ----------
    begun
        Whether nothing new is taken.
    """

    def __init__(self) -> None:
        self.begun = False
        self._over = False
        self._running: set[asyncio.Timeout] = set()

    def check(self) -> None:
        """Raise ShuttingDownError where nothing new is taken."""
        if self.begun:
            raise ShuttingDownError("the gateway is shutting down and takes no new requests")

    async def bound(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` to its end; ShuttingDownError where the deadline comes before."""
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

    async def drain(self, deadline_s: float, at_once: Callable[[], bool]) -> None:
        """Take nothing new, and return when nothing runs any more; what still does at the deadline is ended.

        Parameters
        ----------
        deadline_s
            Seconds from now.
        at_once
            Whether the deadline has come, whatever the time is.
        """
        self.begun = True
        logger.info("shutting down; %d sequences run, and have %g s", len(self._running), deadline_s)
        await self._look(deadline_s, at_once)
        self._over = True
        if self._running:
            logger.warning("%d sequences are ended before they are complete", len(self._running))
            for limit in self._running:
                limit.reschedule(0.0)
            await self._look(_LAST_WORDS_S, lambda: False)

    async def _look(self, most_s: float, enough: Callable[[], bool]) -> None:
        """Return when nothing runs any more, or after this time, or when it is enough."""
        loop = asyncio.get_running_loop()
        until = loop.time() + most_s
        while self._running and loop.time() < until and not enough():  # noqa: ASYNC110 - a signal sets no event
            await asyncio.sleep(_LOOK_S)
