"""Sources in tests: their states as they come, and what a membership makes of them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from ares.gateway.discovery.base import Source, SourceError

PATIENCE_S = 20.0


class Following:
    """What a source says, as it says it."""

    def __init__(self) -> None:
        self._said: asyncio.Queue[list[str] | str] = asyncio.Queue()

    async def next(self) -> list[str] | str:
        """Return its next state, or the error that ended it."""
        return await asyncio.wait_for(self._said.get(), PATIENCE_S)

    async def until(self, wanted: list[str] | str) -> None:
        """Wait until it says so."""
        async with asyncio.timeout(PATIENCE_S):
            while await self._said.get() != wanted:
                pass

    @property
    def quiet(self) -> bool:
        return self._said.empty()

    async def run(self, source: Source) -> None:
        while True:
            try:
                async with contextlib.aclosing(source.states()) as states:
                    async for urls in states:
                        self._said.put_nowait(urls)
            except SourceError as error:
                self._said.put_nowait(str(error))
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def following(source: Source) -> AsyncIterator[Following]:
    """Follow a source, again after each of its errors."""
    found = Following()
    task = asyncio.create_task(found.run(source))
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
