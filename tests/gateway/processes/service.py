"""Real processes of one gateway, over fake instances, and a client of them."""

import asyncio
import contextlib
import json
import logging
import multiprocessing
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from ares.config import GatewayConfig
from ares.gateway import serving
from ares.gateway.openai import tokenizer
from tests.gateway.fakes import FakeInstance, expected, free_port
from tests.gateway.gateways import configuration
from tests.gateway.running import VOCABULARY
from tests.integration.client import Client, Output
from tests.waiting import eventually_found


class Processes(Client):
    """Every request has a connection of its own, so that the processes get them in turn."""

    def __init__(self, http: aiohttp.ClientSession, url: str, process: Any) -> None:
        super().__init__(http, url, "some/model")
        self.parent = process

    async def processes(self) -> list[dict[str, Any]]:
        """Return what the status says of each process, once all are ready."""

        async def ready() -> list[dict[str, Any]]:
            with contextlib.suppress(aiohttp.ClientError):
                found: list[dict[str, Any]] = (await self.status())["processes"]
                return found if len(found) == 2 and all(one["ready"] for one in found) else []
            return []

        found: list[dict[str, Any]] = await eventually_found(ready, 60)
        return found

    async def metrics(self) -> dict[str, float]:
        """Return the samples of the metrics by name and labels."""
        async with self.http.get(f"{self.url}/metrics") as reply:
            lines = (await reply.text()).splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    async def events(self) -> dict[str, Any]:
        """Return the first events of the feed by name."""
        found: dict[str, Any] = {}
        async with self.http.get(f"{self.url}/admin/v1/events") as reply:
            while "snapshot" not in found:
                name = (await reply.content.readline()).decode().removeprefix("event: ").strip()
                found[name] = json.loads((await reply.content.readline()).removeprefix(b"data: "))
                await reply.content.readline()
        return found

    async def command(self, method: str, path: str, **body: Any) -> int:
        """Send an operator's command; return the status of the reply."""
        async with self.http.request(method, f"{self.url}/admin/v1/{path}", json=body) as reply:
            return reply.status

    async def check(self, number: int, task: "asyncio.Task[Output]", tokens: int) -> None:
        """Wait for a stream, and check that it has every token once."""
        output = await asyncio.wait_for(task, 30)
        assert output.error is None
        assert output.token_ids == expected(prompt(number), tokens, vocabulary=VOCABULARY)


def prompt(number: int) -> list[int]:
    return [10, 10 + number, 30]


@contextlib.asynccontextmanager
async def serving_in_processes(
    fakes: list[FakeInstance], folder: Path, scheme: str = "http", **settings: Any
) -> AsyncIterator[Processes]:
    """Start two processes; what this process has loaded they have, too, such as the tokenizer."""
    port = free_port()
    defaults: dict[str, Any] = {"shutdown_timeout_s": 10.0}
    if "models" not in settings:
        defaults["served_model_name"] = ["some/model"]
    config = configuration(fakes, processes=2, port=port, **(defaults | settings))
    if "models" not in settings:
        config = config.model_copy(update={"model": str(folder)})
    tokenizer.load(folder)  # once for all tests
    context = multiprocessing.get_context("fork")
    parent = context.Process(target=_serve, args=(config,))
    parent.start()
    connector = aiohttp.TCPConnector(limit=0, force_close=True, ssl=False)
    try:
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as http:
            made = Processes(http, f"{scheme}://127.0.0.1:{port}", parent)
            await made.processes()
            yield made
    finally:
        parent.terminate()
        await asyncio.to_thread(parent.join, 20)
        assert parent.exitcode is not None


def _serve(config: GatewayConfig) -> None:
    logging.getLogger().handlers.clear()  # pytest's: the log is for the standard error, as a user has it
    serving.serve(config, lambda *_: None)
