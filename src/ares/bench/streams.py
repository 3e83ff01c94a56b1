"""Greedy streams of random prompts, sent at once, and the KV blocks that instances have in use."""

import asyncio
import random
import time
from typing import Any

import aiohttp

from ares.bench.live import client
from ares.bench.live.load import Planned


def random_streams(count: int, tokens: int) -> list[Planned]:
    """Return greedy completions of so many tokens, with prompts of 20 to 600."""
    generator = random.Random(5)  # noqa: S311 - a workload, not a secret
    return [
        Planned(
            f"stream-{number}",
            0.0,
            {
                "prompt": [generator.randrange(1000, 40000) for _ in range(generator.randrange(20, 600))],
                "temperature": 0,
                "ignore_eos": True,
                "max_tokens": tokens,
            },
        )
        for number in range(count)
    ]


async def play(http: aiohttp.ClientSession, url: str, model: str, planned: list[Planned]) -> list[client.Observed]:
    """Send all at once, and return what came."""
    return list(await asyncio.gather(*(client.one(http, url, model, each, time.monotonic()) for each in planned)))


def blocks(read: dict[str, Any]) -> dict[str, int]:
    """Return the KV blocks in use of each instance that a status knows them of."""
    return {row["name"]: row["kv_blocks_used"] for row in read["instances"] if "kv_blocks_used" in row}
