"""An instance dies: its streams go on elsewhere, token for token, and it is no longer a target."""

import asyncio
import signal
import time

import pytest

from ares.local_cluster import cluster as local
from tests.integration.client import Client
from tests.waiting import eventually_found

PROMPT = list(range(300, 600))
LENGTH = 1200


def process_of(cluster: local.Cluster, name: str) -> local.ManagedProcess:
    return next(process for process in cluster.processes if process.name == name)


async def gather_on(client: Client, names: list[str], target: str) -> None:
    """Move running requests to one instance; a move that meets a request between two instances is ordered again."""
    for name in names:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            row = await client.row(name)
            if row is not None and row["instance"] == target and row["movable"]:
                break
            if row is None or not row["movable"] or (await client.migrate(name, target))[0] != 200:
                await asyncio.sleep(0.02)
        else:
            raise AssertionError(f"{name} did not come to {target}: {row}")


async def test_streams_outlive_a_frozen_instance_and_it_comes_back(client: Client, cluster: local.Cluster) -> None:
    """Stopped, not dead: its connections stay open and silent."""
    expected = (await client.complete(PROMPT, LENGTH))["choices"][0]["token_ids"]
    streams = [client.stream(f"frozen-{n}", PROMPT, LENGTH) for n in range(3)]
    await gather_on(client, [f"frozen-{n}" for n in range(3)], "decode-1")
    process_of(cluster, "decode-1").send(signal.SIGSTOP)
    try:
        outputs = [await task for _, task in streams]
    finally:
        process_of(cluster, "decode-1").send(signal.SIGCONT)
    for output in outputs:
        assert output.error is None
        assert output.token_ids == expected

    async def rejoined() -> bool:
        row = next(i for i in (await client.status())["instances"] if i["name"] == "decode-1")
        return row["healthy"] and not row["kv_blocks_used"]

    await eventually_found(rejoined)


@pytest.mark.gpu_defaults
async def test_streams_outlive_their_instance(client: Client, cluster: local.Cluster) -> None:
    length = 150 if client.slow else LENGTH
    # State that vLLM keeps beside the tokens comes to life again too.
    state = {"seed": 4, "temperature": 1.0, "presence_penalty": 0.5}
    whole = await asyncio.gather(client.complete(PROMPT, length), client.complete(PROMPT, length, **state))
    expected, stateful = (reply["choices"][0]["token_ids"] for reply in whole)
    streams = [client.stream(f"survivor-{n}", PROMPT, length, **(state if n == 0 else {})) for n in range(6)]
    for output, _ in streams:
        await output.reach(20)
    # Gather some on the instance that will die; one more move towards it is under way when it does.
    await gather_on(client, [f"survivor-{n}" for n in range(4)], "decode-1")
    hosted = [r["id"] for r in (await client.status())["requests"] if r["instance"] == "decode-1"]
    assert len(hosted) >= 4
    staying = next(n for n in (5, 4) if f"survivor-{n}" not in hosted)
    move = asyncio.create_task(client.migrate(f"survivor-{staying}", "decode-1", "pre_copy"))
    # And one away from it.
    leave = asyncio.create_task(client.migrate(hosted[0], "decode-0", "pre_copy"))
    await asyncio.sleep(0.003)
    process_of(cluster, "decode-1").send(signal.SIGKILL)

    outputs = [await task for _, task in streams]
    for number, output in enumerate(outputs):
        assert output.error is None
        assert output.token_ids == (stateful if number == 0 else expected)
        assert output.usage == {"prompt_tokens": 300, "completion_tokens": length, "total_tokens": 300 + length}
    code, record = await move
    assert code == 503 or record["outcome"] in ("moved", "returned", "finished_first", "not_running", "not_copied"), (
        record
    )

    code, record = await leave
    assert code in (200, 404, 409), record


async def test_a_dead_target_is_refused(client: Client, cluster: local.Cluster) -> None:
    process_of(cluster, "decode-1").send(signal.SIGKILL)

    async def noticed() -> bool:
        return not {i["name"]: i for i in (await client.status())["instances"]}["decode-1"]["healthy"]

    await eventually_found(noticed)
    output, task = client.stream("stays", PROMPT, 300)
    await output.reach(5)
    code, answer = await client.migrate("stays", "decode-1")
    assert code == 503
    assert "decode-1" in answer["error"]["message"]
    assert len((await task).token_ids) == 300
