"""Which pulls are done within a step, and the measured speed of pulls."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

MEGABYTE = 1 << 20


def stats(*pulls: tuple[float, int]) -> Any:
    return SimpleNamespace(
        data={"transfer_duration": [s for s, _ in pulls], "bytes_transferred": [size for _, size in pulls]}
    )


def policy(*, one_sided: bool = True) -> Any:
    from ares.engine.connector.pull import PullPolicy

    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config={}),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    tensors = [SimpleNamespace(size=1600)]
    cache = SimpleNamespace(kv_cache_groups=[0], kv_cache_tensors=tensors, num_blocks=10)
    side = SimpleNamespace(transfer_tp_size=1, use_host_buffer=False, block_size=16)
    return PullPolicy(config, cache, side, one_sided=one_sided)


def test_the_speed_is_an_average_over_large_pulls() -> None:
    pulls = policy()
    assert pulls.token_bytes == 10
    pulls.record_speed(None, within_step=False)
    pulls.record_speed(stats((0.001, 1000), (0.0, MEGABYTE)), within_step=True)
    assert pulls.bytes_per_s == 0
    pulls.record_speed(stats((0.1, 10 * MEGABYTE)), within_step=False)
    assert pulls.bytes_per_s == pytest.approx(100 * MEGABYTE)
    # Timed within a step it is exact, and what is timed until a step ends counts no more.
    pulls.record_speed(stats((0.01, 10 * MEGABYTE)), within_step=True)
    pulls.record_speed(stats((10.0, 10 * MEGABYTE)), within_step=False)
    assert pulls.bytes_per_s == pytest.approx(1000 * MEGABYTE)
    for _ in range(50):
        pulls.record_speed(stats((0.02, 10 * MEGABYTE)), within_step=True)
    assert pulls.bytes_per_s == pytest.approx(500 * MEGABYTE, rel=0.01)


def test_a_precopy_is_never_pulled_within_a_step() -> None:
    pulls = policy()
    params = {"remote_engine_id": "peer", "remote_host": "h", "tp_size": 1}
    assert not pulls.within_step(params, 100)
    pulls.record(params, failed=False)
    assert pulls.within_step(params, 100)
    assert not pulls.within_step({**params, "ares_ahead": True}, 100)
    assert not pulls.within_step(params, 10_000_000)


def test_a_pull_that_needs_its_peer_is_never_done_within_a_step() -> None:
    """Neither from another host, nor from this one where the instance is not on loopback and so uses TCP for both."""
    pulls = policy(one_sided=False)
    params = {"remote_engine_id": "peer", "remote_host": "h", "tp_size": 1}
    pulls.record(params, failed=False)
    assert not pulls.within_step(params, 1)
