"""An instance dies: its streams go on elsewhere, token for token, and it is no longer a target."""

import asyncio
import os
import signal

import psutil

from ares import local
from tests.integration.client import Client

PROMPT = list(range(3000, 3300))


def processes(cluster: local.Cluster, name: str) -> list[int]:
    """Process ids of an instance, its engine first."""
    part = next(part for part in cluster.parts if part.name == name)
    return [child.pid for child in psutil.Process(part.process.pid).children(recursive=True)] + [part.process.pid]


async def test_streams_outlive_a_frozen_instance_and_it_comes_back(client: Client, cluster: local.Cluster) -> None:
    """Stopped, not dead: its connections stay open and silent."""
    expected = (await client.complete(PROMPT, 900))["choices"][0]["token_ids"]
    streams = [client.stream(f"frozen-{n}", PROMPT, 900) for n in range(3)]
    for n, (output, _) in enumerate(streams):
        await output.reach(10)
        await client.migrate(f"frozen-{n}", "decode-2")
    hosted = [r["id"] for r in (await client.status())["requests"] if r["instance"] == "decode-2"]
    assert len(hosted) == 3
    for pid in processes(cluster, "decode-2"):
        os.kill(pid, signal.SIGSTOP)
    try:
        outputs = [await task for _, task in streams]
    finally:
        for pid in processes(cluster, "decode-2"):
            os.kill(pid, signal.SIGCONT)
    for output in outputs:
        assert output.error is None
        assert output.token_ids == expected
    for _ in range(150):
        row = next(i for i in (await client.status())["instances"] if i["name"] == "decode-2")
        if row["healthy"] and not row["kv_blocks_used"]:
            break
        await asyncio.sleep(0.1)
    assert row["healthy"], "a thawed instance rejoins"


async def test_streams_outlive_their_instance(client: Client, cluster: local.Cluster) -> None:
    expected = (await client.complete(PROMPT, 900))["choices"][0]["token_ids"]
    streams = [client.stream(f"survivor-{n}", PROMPT, 900) for n in range(6)]
    for output, _ in streams:
        await output.reach(20)
    # Gather some on the instance that will die; one more move towards it is under way when it does.
    for n in range(4):
        await client.migrate(f"survivor-{n}", "decode-2")
    hosted = [r["id"] for r in (await client.status())["requests"] if r["instance"] == "decode-2"]
    assert len(hosted) >= 4
    staying = next(n for n in (5, 4) if f"survivor-{n}" not in hosted)
    move = asyncio.create_task(client.migrate(f"survivor-{staying}", "decode-2"))
    await asyncio.sleep(0.003)
    for pid in processes(cluster, "decode-2"):
        os.kill(pid, signal.SIGKILL)

    outputs = [await task for _, task in streams]
    for output in outputs:
        assert output.error is None
        assert output.token_ids == expected
        assert output.usage == {"prompt_tokens": 300, "completion_tokens": 900, "total_tokens": 1200}
    code, record = await move
    assert code == 503 or record["outcome"] in ("moved", "returned", "finished_first", "not_running"), record


async def test_a_dead_target_is_refused(client: Client) -> None:
    for _ in range(100):
        instances = {i["name"]: i for i in (await client.status())["instances"]}
        if not instances["decode-2"]["healthy"]:
            break
        await asyncio.sleep(0.1)
    assert not instances["decode-2"]["healthy"]
    output, task = client.stream("stays", PROMPT, 300)
    await output.reach(5)
    code, answer = await client.migrate("stays", "decode-2")
    assert code == 503
    assert "decode-2" in answer["error"]["message"]
    assert len((await task).token_ids) == 300
