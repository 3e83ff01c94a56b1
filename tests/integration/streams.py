"""Streams under faults of the network: what each must become, and whether it goes on in bounded time."""

import asyncio
import itertools
import random
import time

from ares.local_cluster import cluster as local
from tests.integration.client import Client, Output
from tests.integration.tiny_model import VOCABULARY

LENGTH = 500
# A silent instance is given up after 6 s (gateway/pool/health.py); then the request is prefilled again. The rest is for
# a machine that does other work.
RESUMED_S = 20.0
_seeds = itertools.count(7000)


def losses(cluster: local.Cluster) -> int:
    """Count how often the gateway has lost an instance: on a busy machine one may be silent for too long."""
    return (cluster.log_folder / "gateway.log").read_text().count(" is lost: ")


class Streams:
    """Some streams, what each must become, and when its newest token came."""

    def __init__(
        self, client: Client, name: str, count: int, vocabulary: int = VOCABULARY, length: int = LENGTH
    ) -> None:
        self.client, self.length = client, length
        self.names = [f"{name}-{n}" for n in range(count)]
        self.prompts = [_prompt(200 + 100 * n, vocabulary) for n in range(count)]
        self.expected: list[list[int]] = []
        self.outputs: list[Output] = []
        self.tasks: list[asyncio.Task[Output]] = []

    async def start(self) -> "Streams":
        """Ask for every output unmoved, then start the streams; return when each has some tokens."""
        whole = [self.client.complete(prompt, self.length) for prompt in self.prompts]
        self.expected = [reply["choices"][0]["token_ids"] for reply in await asyncio.gather(*whole)]
        for name, prompt in zip(self.names, self.prompts, strict=True):
            output, task = self.client.stream(name, prompt, self.length)
            self.outputs.append(output)
            self.tasks.append(task)
        for output in self.outputs:
            await output.reach(10)
        return self

    async def gather(self, target: str, within_s: float = RESUMED_S) -> None:
        """Move those that still run to one instance, each within some time."""
        for name in self.names:
            async with asyncio.timeout(within_s):
                while (row := await self.client.row(name)) is not None and row["instance"] != target:
                    if not row["movable"] or (await self.client.migrate(name, target))[0] != 200:
                        await asyncio.sleep(0.02)

    async def resumed(self, within_s: float = RESUMED_S) -> float:
        """Wait until every stream has brought another token, and return after how long."""
        began, counts = time.monotonic(), [len(output.token_ids) for output in self.outputs]
        async with asyncio.timeout(within_s):
            for output, count in zip(self.outputs, counts, strict=True):
                await output.reach(min(count + 20, self.length))
        return time.monotonic() - began

    async def check(self) -> None:
        """Wait for the ends: every token is that of the unmoved request."""
        for output, task, expected in zip(self.outputs, self.tasks, self.expected, strict=True):
            await task
            assert output.error is None
            assert output.token_ids == expected


async def until_healthy(client: Client, name: str, wanted: bool, within_s: float = RESUMED_S) -> None:
    async with asyncio.timeout(within_s):
        while next(i for i in (await client.status())["instances"] if i["name"] == name)["healthy"] is not wanted:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.1)


def _prompt(length: int, vocabulary: int) -> list[int]:
    """Return a prompt that nothing else has used, so that nothing of it is cached anywhere."""
    draw = random.Random(next(_seeds))
    return [draw.randrange(3, vocabulary) for _ in range(length)]
