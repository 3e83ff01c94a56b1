"""Roles change on real engines while streams run: every token is that of the undisturbed request, nothing is left."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.integration.client import Client
from tests.integration.streams import Streams
from tests.waiting import eventually_found

PATIENCE_S = 60.0


async def order(client: Client, name: str, role: str) -> None:
    """Change a role, and wait until the instance has it."""
    if (await instance(client, name))["role"] == role:
        return

    async def ordered() -> bool:
        async with client.http.post(f"{client.url}/admin/v1/instances/{name}/role", json={"role": role}) as reply:
            # 503: an instance that a busy machine keeps from reporting, or from giving its part of the lease.
            assert reply.status in (200, 503), await reply.text()
            return reply.status == 200

    await eventually_found(ordered)
    async with asyncio.timeout(PATIENCE_S):
        while (await instance(client, name))["role"] != role:
            assert (await instance(client, name))["next_role"] in (role, None)
            await asyncio.sleep(0.05)


async def instance(client: Client, name: str) -> dict[str, object]:
    return next(row for row in (await client.status())["instances"] if row["name"] == name)


async def places(client: Client) -> set[str]:
    """Return where requests decode."""
    return {row["instance"] for row in (await client.status())["requests"] if row["state"] == "decode"}


@pytest.fixture
async def roles_of_before(client: Client) -> AsyncIterator[None]:
    """Give the shared cluster its roles back, also after a failure: other tests use it."""
    yield
    for name, role in (("decode-0", "decode"), ("decode-1", "decode"), ("prefill-0", "prefill")):
        await order(client, name, role)


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("roles_of_before")
async def test_roles_change_while_streams_run_and_no_token_is_lost(client: Client) -> None:
    streams = await Streams(client, "roles", 4, length=1200).start()
    await order(client, "decode-0", "prefill")

    async def left() -> bool:
        return await places(client) <= {"decode-1"}

    await eventually_found(left)
    # Its prefills are right, too.
    steps = (await instance(client, "decode-0"))["steps"]
    fresh = [list(range(100 + n, 300 + n)) for n in range(4)]
    prefilled = await asyncio.gather(*(client.complete(prompt, 30) for prompt in fresh))

    async def computed() -> bool:
        return (await instance(client, "decode-0"))["steps"] != steps

    await eventually_found(computed)
    await order(client, "decode-0", "decode")
    await streams.gather("decode-0")
    # One instance for everything: what it has prefilled itself it does not pull from itself.
    await order(client, "prefill-0", "both")
    await order(client, "decode-1", "prefill")
    await streams.gather("prefill-0")
    again = await asyncio.gather(*(client.complete(prompt, 30) for prompt in fresh))
    await streams.check()
    ids = [[reply["choices"][0]["token_ids"] for reply in replies] for replies in (prefilled, again)]
    assert ids[0] == ids[1]
    await order(client, "decode-1", "decode")
    await order(client, "prefill-0", "prefill")
    moves = (await client.status())["migrations"]
    assert any(move["reason"].startswith("change of role of") and move["outcome"] == "moved" for move in moves)
    assert not any(move["outcome"] == "failed" for move in moves)
