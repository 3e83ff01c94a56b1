"""Greedy streams of random prompts, sent at once, and the KV blocks that instances have in use."""

import asyncio
import random
import time
from typing import Any

import aiohttp

from ares.bench.live import client
from ares.bench.live.load import Planned, random_prompt


def greedy_body(generator: random.Random, prompt_tokens: int, tokens: int) -> dict[str, Any]:
    """Return the body of a completion with exactly this many tokens."""
    prompt = random_prompt(generator, prompt_tokens)
    return {"prompt": prompt, "temperature": 0, "ignore_eos": True, "max_tokens": tokens}


def random_streams(count: int, tokens: int) -> list[Planned]:
    """Return greedy completions with this many output tokens, and prompts of 20 to 600 tokens."""
    generator = random.Random(5)  # noqa: S311 - a workload, not a secret
    return [
        Planned(f"stream-{number}", 0.0, greedy_body(generator, generator.randrange(20, 600), tokens))
        for number in range(count)
    ]


async def send_all(http: aiohttp.ClientSession, url: str, model: str, planned: list[Planned]) -> list[client.Observed]:
    """Send all concurrently, and return what was received."""
    now = time.monotonic()
    return list(await asyncio.gather(*(client.send_request(http, url, model, each, now) for each in planned)))


def kv_blocks_used(status: dict[str, Any]) -> dict[str, int]:
    """Return the KV blocks in use of each instance that reports them."""
    return {row["name"]: row["kv_blocks_used"] for row in status["instances"] if "kv_blocks_used" in row}
