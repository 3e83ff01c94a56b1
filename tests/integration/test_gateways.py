"""A second gateway process before the same real engines is killed: only its own streams end, and nothing is left."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import aiohttp

from ares.free_ports import free_port
from ares.local_cluster import cluster as local
from tests.integration.client import Client
from tests.waiting import eventually_found

PROMPT, LENGTH = list(range(400, 600)), 1000
# Together more than the engines hold, so that some are held while their KV waits at the prefill instance.
LARGE, REQUESTS = 2000, 24
# vLLM keeps for 30 s what nobody pulls (kv_lease_duration); an instance that misses its gateway, for 10 s.
SOON_S = 26


async def test_a_killed_gateway_leaves_nothing_behind(client: Client, cluster: local.Cluster, tmp_path: Path) -> None:
    port = free_port("127.0.0.1", cluster.ports)
    command = ["gateway", "--model", cluster.settings.model, "--preset", "ares", "--port", str(port)]
    for worker in cluster.workers:
        command += ["--worker", worker.url]
    beside = local.Cluster(cluster.settings, cluster.console, tmp_path)
    beside.start("beside", f"http://127.0.0.1:{port}", command)
    victim = Client(client.http, beside.processes[0].url, client.model)

    async def ready() -> bool:
        beside.check()
        with contextlib.suppress(aiohttp.ClientError):
            return all(row["healthy"] for row in (await victim.status())["instances"])
        return False

    async def in_the_middle() -> list[dict[str, Any]]:
        status = await victim.status()
        movable = [row for row in status["requests"] if row["movable"]]
        return movable if status["waiting"] and await pinned() else []

    async def pinned() -> int:
        return int(next(row["pinned"] for row in (await client.status())["instances"] if row["name"] == "prefill-0"))

    async def nothing_pinned() -> bool:
        return not await pinned()

    try:
        expected = (await client.complete(PROMPT, LENGTH))["choices"][0]["token_ids"]
        await eventually_found(ready)
        streams = [victim.stream(f"dies-{n}", [9 + n] * LARGE, 1500) for n in range(REQUESTS)]
        own, task = client.stream("stays", PROMPT, LENGTH)
        await own.reach(5)
        other = {"decode-0": "decode-1", "decode-1": "decode-0"}
        moves = [
            asyncio.create_task(victim.migrate(row["id"], other[row["instance"]]))
            for row in (await eventually_found(in_the_middle))[:3]
        ]
        await asyncio.sleep(0.02)
        beside.processes[0].popen.kill()
        await eventually_found(nothing_pinned, SOON_S)
        await asyncio.gather(*moves, *(task for _, task in streams), return_exceptions=True)
        output = await task
        assert output.error is None
        assert output.token_ids == expected
        await client.quiet()
    finally:
        beside.stop()
