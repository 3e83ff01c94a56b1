"""Two hosts, each with its own address, and a network between them that fails: no stream hangs, no token is wrong.

Every test compares with what the same prompt gave unmoved, before; afterwards nothing runs and no block is held.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.integration import namespaces, two_hosts
from tests.integration.client import Client
from tests.integration.conftest import STOCK, TINY_FLAGS, Environments
from tests.integration.streams import RESUMED_S, Streams, until_healthy
from tests.integration.test_precopy import fresh_prompt, pulled_by

# The engines start within the first test. What takes long runs on demand (`make matrix`), and with mock engines each
# time (tests/mock_engine).
pytestmark = pytest.mark.timeout(1200)

INSTANCES = ("prefill-0", "decode-0", "decode-1")
# An order of a move ends by itself: two times the longest hand-over, 10 s, and what the stream itself takes.
MOVE_S = 30.0
# After an outage, TCP may wait as long again before it sends: the word of a pull may come later than the end of the
# lease of 30 s on the KV.
LEASE_ENDS_S = 60.0


@pytest.fixture(scope="module")
def hosts(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, environment_of: Environments
) -> Iterator[two_hosts.Cluster]:
    if (reason := namespaces.why_not()) is not None:
        pytest.skip(reason)
    logs, environment = tmp_path_factory.mktemp("two-hosts"), environment_of(STOCK)
    with two_hosts.running(tiny_model, logs, *TINY_FLAGS, environment=environment) as cluster:
        yield cluster


@pytest.fixture
async def client(hosts: two_hosts.Cluster) -> AsyncIterator[Client]:
    """Talk to the gateway on its host; afterwards nothing must be left."""
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=hosts.connector(), timeout=timeout) as http:
        client = Client(http, hosts.url, str(hosts.model))
        yield client
        await client.quiet(LEASE_ENDS_S)


async def expired(client: Client) -> list[float]:
    return [await client.engine_metric(name, "vllm:nixl_num_kv_expired_reqs_total") for name in INSTANCES]


async def both_pull(client: Client, name: str, length: int = 1500, outage_s: float = 0.0) -> None:
    """Move streams to one host and to the other: KV comes over both times, and every token is right.

    After an outage, TCP sends again no later than after as long as it lasted: it doubles the time between two attempts.
    """
    streams = await Streams(client, name, 2, length=length).start()
    within_s = outage_s + RESUMED_S
    await streams.gather("decode-0", within_s)
    for target in ("decode-1", "decode-0"):
        await streams.gather(target, within_s)
    moves = [move for move in (await client.status())["migrations"] if move["request_id"] in streams.names]
    # The first pull after an outage may find the connection broken: its tokens are computed, and the next one connects.
    assert {move["target"] for move in moves if move["pulled_tokens"]} == {"decode-0", "decode-1"}, moves
    await streams.check()


async def test_each_host_publishes_its_own_address(client: Client, hosts: two_hosts.Cluster) -> None:
    one, two = hosts.network.addresses["one"], hosts.network.addresses["two"]
    for url, address in ((f"http://{one}:8100", one), (f"http://{one}:8101", one), (f"http://{two}:8100", two)):
        async with client.http.get(f"{url}/ares/v1/instance") as reply:
            assert f"tcp://{address}:" in (await reply.json())["control_address"]


@pytest.mark.parametrize("mode", ["stop_and_copy", "pre_copy"])
async def test_requests_move_between_the_hosts(client: Client, mode: str) -> None:
    before = await expired(client)
    streams = await Streams(client, f"moved-{mode}", 3, length=1500).start()
    pulled = [await pulled_by(client, name) for name in INSTANCES[1:]]
    await streams.gather("decode-1")
    moved = 0
    for target in ("decode-0", "decode-1", "decode-0"):
        for name in streams.names:
            if (await client.row(name) or {}).get("movable"):
                code, record = await client.migrate(name, target, mode)
                moved += code == 200 and record["outcome"] == "moved"
    await streams.check()
    assert moved >= 3
    assert sum([await pulled_by(client, name) for name in INSTANCES[1:]]) > sum(pulled)
    assert await expired(client) == before


async def test_a_connection_that_broke_while_it_was_idle_is_made_again(
    client: Client, hosts: two_hosts.Cluster
) -> None:
    await both_pull(client, "before", 600)
    with hosts.network.closed_between("one", "two"):
        await asyncio.sleep(two_hosts.BREAKS_S)
    await both_pull(client, "after", 600, two_hosts.BREAKS_S)


async def test_a_drain_empties_a_host(client: Client) -> None:
    before = await expired(client)
    streams = await Streams(client, "drained", 3, length=1500).start()
    await streams.gather("decode-1")
    async with client.http.post(f"{client.url}/admin/v1/instances/decode-1/drain", json={"deadline_s": 30}) as reply:
        assert reply.status == 200, await reply.text()
    async with asyncio.timeout(30):
        while any(r["instance"] == "decode-1" for r in (await client.status())["requests"]):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert not all(task.done() for task in streams.tasks)
    await streams.check()
    async with client.http.post(f"{client.url}/admin/v1/instances/decode-1/undrain") as reply:
        assert reply.status == 200, await reply.text()
    assert await expired(client) == before


@pytest.mark.matrix
async def test_streams_of_a_host_that_is_cut_off_resume_on_the_other(client: Client, hosts: two_hosts.Cluster) -> None:
    streams = await Streams(client, "cut", 3).start()
    await streams.gather("decode-1")
    with hosts.network.cut("two"):
        await streams.resumed()
        await until_healthy(client, "decode-1", False)
        await streams.check()
    await until_healthy(client, "decode-1", True)
    await both_pull(client, "healed")


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["stop_and_copy", "pre_copy"])
async def test_a_move_across_a_broken_link_ends_and_the_stream_goes_on(
    client: Client, hosts: two_hosts.Cluster, mode: str
) -> None:
    """The gateway reaches both hosts, which do not reach each other."""
    streams = await Streams(client, f"torn-{mode}", 2).start()
    await streams.gather("decode-1")
    began = time.monotonic()
    with hosts.network.closed_between("one", "two"):
        async with asyncio.timeout(MOVE_S):
            orders = await asyncio.gather(*(client.migrate(name, "decode-0", mode) for name in streams.names))
        await streams.resumed()
    outage_s = time.monotonic() - began
    await streams.check()
    assert all(code in (200, 409) for code, _ in orders), orders
    await both_pull(client, f"mended-{mode}", outage_s=outage_s)


@pytest.mark.matrix
async def test_a_request_whose_prefill_cannot_be_pulled_is_served(client: Client, hosts: two_hosts.Cluster) -> None:
    prompts = [fresh_prompt(300) for _ in range(4)]
    with hosts.network.closed_between("one", "two"):
        async with asyncio.timeout(60):
            replies = await asyncio.gather(*(client.complete(prompt, 30) for prompt in prompts))
    await both_pull(client, "reached")
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply["choices"][0]["token_ids"] == (await client.complete(prompt, 30))["choices"][0]["token_ids"]


@pytest.mark.matrix
async def test_a_slow_and_lossy_link_costs_time_only(client: Client, hosts: two_hosts.Cluster) -> None:
    before = await expired(client)
    with hosts.network.impaired("two", 0.02, 0.02):
        await both_pull(client, "lossy", 2500)
    assert await expired(client) == before


@pytest.mark.matrix
async def test_streams_of_a_killed_instance_resume_on_the_other_host(client: Client, hosts: two_hosts.Cluster) -> None:
    """The last one: it does not come back."""
    streams = await Streams(client, "killed", 3).start()
    await streams.gather("decode-1")
    hosts.kill("decode-1")
    await streams.resumed()
    await streams.check()
    await until_healthy(client, "decode-1", False)
