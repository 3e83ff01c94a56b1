"""The time of a plan: it is stopped while a machine is too slow for what the plan assumes."""

import asyncio
import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Seconds since the start, without those in which it was stopped.

    A plan with two decode instances kills one and moves requests afterwards. A real engine needs 20 s to come back, and
    minutes on a busy machine: events by the wall clock would all fall into a time in which nothing can move.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._stops = 0
        self._stopped_since = 0.0
        self._running = asyncio.Event()
        self._running.set()

    def now(self) -> float:
        """Return the time of the plan, seconds."""
        return (self._stopped_since if self._stops else time.monotonic()) - self._start

    async def reach(self, at_s: float) -> None:
        """Wait until this time of the plan."""
        while (left := at_s - self.now()) > 0.0 or self._stops:
            await self._running.wait()
            await asyncio.sleep(max(left, 0.0))

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the clock meanwhile; several may do so at a time."""
        if not self._stops:
            self._stopped_since = time.monotonic()
            self._running.clear()
        self._stops += 1
        try:
            yield
        finally:
            self._stops -= 1
            if not self._stops:
                self._start += time.monotonic() - self._stopped_since
                self._running.set()
