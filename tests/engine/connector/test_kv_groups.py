"""The blocks that we forecast are those that vLLM's own KV cache manager hands out, at every length."""

from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

BLOCK = 16


def specs(kind: str) -> list[Any]:
    import torch
    from vllm.v1 import kv_cache_interface as interface

    size = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    full = interface.FullAttentionSpec(**size)
    windows = {n: interface.SlidingWindowSpec(**size, sliding_window=n) for n in (20, 32, 33, 100)}
    return {
        "full": [full],
        "one window": [full, windows[32]],
        "gemma": [full, *[windows[100]] * 5],
        "odd windows": [full, windows[20], windows[33]],
    }[kind]


@pytest.mark.parametrize("kind", ["full", "one window", "gemma", "odd windows"])
@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 40, 130])
def test_forecast_blocks_are_those_of_vllm(kind: str, prompt: int) -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request

    from ares.engine.connector.kv_groups import kv_groups
    from ares.policy.kv_layout import KvGroup, KvLayout

    groups = [KVCacheGroupSpec([f"layer.{n}"], spec) for n, spec in enumerate(specs(kind))]
    config = KVCacheConfig(num_blocks=500, kv_cache_tensors=[], kv_cache_groups=groups)
    manager = KVCacheManager(
        config, max_model_len=1000, scheduler_block_size=BLOCK, hash_block_size=BLOCK, max_in_flight_tokens=1000,
        enable_caching=False,
    )  # fmt: skip
    layout = KvLayout.of(BLOCK, [KvGroup(g.block_size, g.window, g.fixed_blocks) for g in kv_groups(config)])
    request = Request("r", list(range(prompt)), SamplingParams(max_tokens=500), None)

    def used() -> int:
        return 500 - 1 - int(manager.block_pool.get_num_free_blocks())

    assert manager.allocate_slots(request, prompt) is not None
    assert used() == sum(-(-prompt // BLOCK) for _ in groups)
    request.num_computed_tokens = prompt
    for length in range(prompt + 1, 400):
        request.append_output_token_ids(7)
        assert manager.allocate_slots(request, 1) is not None
        assert used() == layout.blocks(length), length
        request.num_computed_tokens = length
    manager.free(request)
    assert used() == 0
