"""Mock engines on two hosts, without vLLM: what a gateway and the control channels make of a network that fails."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.gateway.conftest import byte_tokenizer, model_folder  # noqa: F401 - fixtures
from tests.gateway.running import VOCABULARY
from tests.integration import namespaces, two_hosts
from tests.integration.client import Client
from tests.integration.streams import Streams, until_healthy

pytestmark = pytest.mark.timeout(240)

PROFILE = "llama-8b-rtx4090"


@pytest.fixture(scope="module")
def hosts(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[two_hosts.Cluster]:  # noqa: F811
    if (reason := namespaces.why_not()) is not None:
        pytest.skip(reason)
    with two_hosts.running(model_folder, tmp_path_factory.mktemp("two-hosts"), profile=PROFILE) as cluster:
        yield cluster


@pytest.fixture
async def client(hosts: two_hosts.Cluster) -> AsyncIterator[Client]:
    """Talk to the gateway on its host; afterwards nothing must be left."""
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=hosts.connector(), timeout=timeout) as http:
        client = Client(http, hosts.url, str(hosts.model))
        yield client
        await client.quiet()


async def gathered(client: Client, name: str, target: str = "decode-1") -> Streams:
    """Start streams and bring all to one instance."""
    streams = await Streams(client, name, 3, VOCABULARY).start()
    await streams.gather(target)
    return streams


async def test_streams_of_a_host_that_is_cut_off_resume_on_the_other(client: Client, hosts: two_hosts.Cluster) -> None:
    streams = await gathered(client, "cut")
    with hosts.network.cut("two"):
        await streams.resumed()
        await until_healthy(client, "decode-1", False)
        await streams.check()
    await until_healthy(client, "decode-1", True)
    again = await gathered(client, "healed")
    await again.gather("decode-0")
    await again.check()


async def test_a_short_cut_loses_nothing(client: Client, hosts: two_hosts.Cluster) -> None:
    """Shorter than what a gateway takes for a loss: the streams go on where they are."""
    streams = await gathered(client, "short")
    with hosts.network.cut("two"):
        await asyncio.sleep(1.5)
    await streams.resumed()
    await streams.check()


async def test_requests_that_come_while_prefill_is_cut_off_are_served(client: Client, hosts: two_hosts.Cluster) -> None:
    with hosts.network.cut("one"):
        async with asyncio.timeout(60):
            reply = await client.complete(list(range(3, 200)), 20)
    assert len(reply["choices"][0]["token_ids"]) == 20
    await until_healthy(client, "prefill-0", True)
    await until_healthy(client, "decode-0", True)


async def test_a_move_across_a_broken_link_ends_and_the_stream_goes_on(
    client: Client, hosts: two_hosts.Cluster
) -> None:
    """The gateway reaches both hosts, which do not reach each other."""
    streams = await gathered(client, "torn")
    with hosts.network.closed_between("one", "two"):
        async with asyncio.timeout(30):
            orders = await asyncio.gather(*(client.migrate(name, "decode-0") for name in streams.names))
        await streams.resumed()
        await streams.check()
    assert all(code in (200, 409) for code, _ in orders), orders


async def test_a_slow_and_lossy_link_costs_time_only(client: Client, hosts: two_hosts.Cluster) -> None:
    with hosts.network.impaired("two", 0.02, 0.02):
        streams = await gathered(client, "lossy")
        await streams.gather("decode-0")
        await streams.check()
