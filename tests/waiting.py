"""Waiting for what nothing announces."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


async def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait until something is true."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.002)


async def eventually_found(find: Callable[[], Awaitable[Any]], timeout_s: float = 90.0) -> Any:
    """Wait until something is true that has to be asked for, and return it."""
    async with asyncio.timeout(timeout_s):
        while not (found := await find()):  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.05)
        return found
