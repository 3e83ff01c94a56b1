"""The time of a plan: it stands still while a machine is too slow for what the plan takes for granted."""

import asyncio
import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Seconds since the start, less those in which it stood still.

    A plan with two decode instances kills one and moves requests afterwards. A real engine needs 20 s to come back, and
    minutes on a busy machine: events by the wall clock would all fall into a time in which nothing can move.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._holds = 0
        self._held_since = 0.0
        self._running = asyncio.Event()
        self._running.set()

    def now(self) -> float:
        """Return the time of the plan, seconds."""
        return (self._held_since if self._holds else time.monotonic()) - self._start

    async def reach(self, at_s: float) -> None:
        """Wait until this moment of the plan."""
        while (left := at_s - self.now()) > 0.0 or self._holds:
            await self._running.wait()
            await asyncio.sleep(max(left, 0.0))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Stand still meanwhile; several may ask for it at a time."""
        if not self._holds:
            self._held_since = time.monotonic()
            self._running.clear()
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            if not self._holds:
                self._start += time.monotonic() - self._held_since
                self._running.set()
