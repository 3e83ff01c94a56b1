"""Greedy streams of random prompts, sent at once or watched, and the KV blocks that instances have in use."""

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from ares.bench import sse
from ares.bench.live import client
from ares.bench.live.load import Planned, random_prompt


@dataclass(slots=True)
class Watched:
    """A stream, and when each of its tokens came."""

    times: list[float] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(self, http: aiohttp.ClientSession, url: str, body: dict[str, Any], name: str) -> None:
        """Send a completion for a stream to a gateway, and read it to its end; StreamError as `sse.open_stream`."""
        async with sse.open_stream(http, f"{url}/v1/completions", body, name) as chunks:
            async for _ in chunks:
                self.times.append(time.monotonic())
                self.changed.set()

    async def reach(self, count: int, stream: "asyncio.Task[None]") -> None:
        """Wait until the stream has this many tokens.

        Raises
        ------
        StreamError
            It ended before; the message has what the server said.
        """
        while len(self.times) < count:
            if stream.done():
                error = stream.exception()
                raise sse.StreamError(f"ended after {len(self.times)} tokens of {count}: {error or 'no error'}")
            self.changed.clear()
            waiter = asyncio.ensure_future(self.changed.wait())
            await asyncio.wait((waiter, stream), return_when=asyncio.FIRST_COMPLETED, timeout=60)
            waiter.cancel()


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


def long_streams(count: int, prompt_tokens: int, tokens: int) -> list[Planned]:
    """Return greedy completions of prompts with exactly this many tokens."""
    generator = random.Random(6)  # noqa: S311 - a workload, not a secret
    return [Planned(f"long-{number}", 0.0, greedy_body(generator, prompt_tokens, tokens)) for number in range(count)]


async def send_all(http: aiohttp.ClientSession, url: str, model: str, planned: list[Planned]) -> list[client.Observed]:
    """Send all concurrently, and return what was received."""
    now = time.monotonic()
    return list(await asyncio.gather(*(client.send_request(http, url, model, each, now) for each in planned)))


def kv_blocks_used(status: dict[str, Any]) -> dict[str, int]:
    """Return the KV blocks in use of each instance that reports them."""
    return {row["name"]: row["kv_blocks_used"] for row in status["instances"] if "kv_blocks_used" in row}
