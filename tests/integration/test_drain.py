"""Every decode instance is told to end and started again, under load: no request fails, every token is right."""

import asyncio
import signal

import pytest

from ares.local_cluster import cluster as local
from tests.integration.client import Client

PROMPT = list(range(400, 600))
LENGTH = 400


async def decodes_on(client: Client, name: str) -> bool:
    """Whether a request that can move runs on an instance."""
    return any(r["instance"] == name and r["movable"] for r in (await client.status())["requests"])


@pytest.mark.timeout(600)
async def test_decode_instances_restart_in_turn_without_one_failure(client: Client, cluster: local.Cluster) -> None:
    expected = (await client.complete(PROMPT, LENGTH))["choices"][0]["token_ids"]
    stopping = asyncio.Event()
    done = 0

    async def load(number: int) -> None:
        nonlocal done
        turn = 0
        while not stopping.is_set():
            turn += 1
            _, task = client.stream(f"load-{number}-{turn}", PROMPT, LENGTH)
            output = await task
            assert output.error is None
            assert output.token_ids == expected
            done += 1

    async def row(name: str) -> dict[str, object]:
        return next((i for i in (await client.status())["instances"] if i["name"] == name), {})

    loads = [asyncio.create_task(load(number)) for number in range(4)]
    try:
        for process in [process for process in cluster.workers if process.name.startswith("decode")]:
            while not await decodes_on(client, process.name):  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0.02)
            process.popen.send_signal(signal.SIGTERM)
            # Whatever status vLLM's teardown ends with: what counts is that nothing was lost.
            await asyncio.to_thread(process.popen.wait, 120)
            cluster.restart(process)
            while not (found := await row(process.name)).get("healthy") or found["draining"]:
                assert process.popen.poll() is None, process.log_end()
                await asyncio.sleep(0.1)
        stopping.set()
        await asyncio.gather(*loads)
    finally:
        for task in loads:
            task.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
    assert done >= 4
    moves = (await client.status())["migrations"]
    assert any(move["reason"].startswith("drain of") and move["outcome"] == "moved" for move in moves)
