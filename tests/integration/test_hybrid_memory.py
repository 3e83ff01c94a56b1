"""A sliding-window hybrid on a real engine: our count of KV blocks is vLLM's, at every length that a poll meets."""

import os
from pathlib import Path
from unittest import mock

import aiohttp
import pytest

from ares.engine.defaults import local_flags
from ares.free_ports import free_port
from ares.local_cluster import cluster as local
from ares.policy.kv_layout import KvGroup, KvLayout
from tests.integration.client import Client
from tests.integration.conftest import FORKED, STOCK, TINY_FLAGS, Environments
from tests.integration.tiny_model import WINDOW, build_hybrid

BLOCK = 128
LAYOUT = KvLayout.of(BLOCK, [KvGroup(BLOCK), KvGroup(BLOCK, window=WINDOW)])


@pytest.mark.matrix
@pytest.mark.timeout(600)
async def test_blocks_of_a_growing_request(tmp_path: Path, environment_of: Environments) -> None:
    (tmp_path / "model").mkdir()
    settings = local.ClusterSettings(
        model=str(build_hybrid(tmp_path / "model")),
        prefill=0,
        decode=1,
        port=free_port("127.0.0.1"),
        preset="off",
        log_folder=tmp_path / "logs",
        worker_flags=("--predictor", "none"),
        vllm_flags=tuple(local_flags(list(TINY_FLAGS))),
        worker_module=FORKED,
    )
    seen: dict[int, int] = {}
    with mock.patch.dict(os.environ, environment_of(STOCK)), local.running(settings) as cluster:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as http:
            client = Client(http, cluster.url, settings.model)
            _, task = client.stream("grows", list(range(10, 60)), 900)
            while not task.done():
                (instance,) = (await client.status())["instances"]
                if instance["running"]:
                    seen[instance["resident_tokens"]] = instance["kv_blocks_used"]
            assert (await task).error is None
            (instance,) = (await client.status())["instances"]
    assert instance["capacity_tokens"] == instance["kv_blocks"] * BLOCK
    # A report comes before or after the newest token was given its slot.
    wrong = {n: used for n, used in seen.items() if used not in {LAYOUT.blocks(n - 1), LAYOUT.blocks(n)}}
    assert wrong == {}
    assert min(seen) < WINDOW
    assert max(seen) > 3 * WINDOW
    assert len(seen) > 30
    # What was counted before, and twice that, would both be wrong.
    assert any(used not in {-(-n // BLOCK), -(-(n - 1) // BLOCK)} for n, used in seen.items())
    assert any(used not in {2 * -(-n // BLOCK), 2 * -(-(n - 1) // BLOCK)} for n, used in seen.items())
