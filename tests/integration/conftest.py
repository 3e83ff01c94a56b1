"""Real engines, started once for the whole run: a prefill and two decode instances of a tiny random model."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from ares.engine.defaults import free_port, local_flags
from ares.local_cluster import cluster as local
from tests.integration.client import Client
from tests.integration.tiny_model import build

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")

# 128 blocks of 128 tokens on each instance: small enough for a test to fill.
TINY_FLAGS = ("--dtype", "float32", "--max-model-len", "4096", "--kv-cache-memory-bytes", "16M")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs engines, and run what kills one last."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engines)
    items.sort(key=lambda item: "test_instance_death" in item.path.name)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny model."""
    return build(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.Cluster]:
    """Run a cluster that moves nothing by itself, so that each test decides."""
    settings = local.ClusterSettings(
        model=str(tiny_model),
        decode=2,
        port=free_port("127.0.0.1"),
        preset="off",
        log_folder=tmp_path_factory.mktemp("logs"),
        worker_flags=("--drain-deadline", "30"),
        vllm_flags=tuple(local_flags(list(TINY_FLAGS))),
    )
    with local.running(settings) as running:
        yield running


@pytest.fixture
async def client(cluster: local.Cluster) -> AsyncIterator[Client]:
    """Talk to the cluster; afterwards everything must be back to zero."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as http:
        client = Client(http, cluster.url, cluster.settings.model)
        yield client
        await client.quiet()
        await asyncio.sleep(0)
