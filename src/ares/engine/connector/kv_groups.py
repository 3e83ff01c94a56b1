"""The KV cache groups of this instance, as gateways forecast with them (policy/kv_layout.py)."""

from typing import Any

from ares.engine.vllm_api import (
    ChunkedLocalAttentionSpec,
    CircularBufferSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from ares.protocol.messages import KvGroup


def kv_groups(kv_cache_config: Any) -> list[KvGroup]:
    """Return the groups of vLLM's KVCacheConfig that share its pool of blocks on the device."""
    return [_group(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups if not group.host_resident]


def _group(spec: Any) -> KvGroup:
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = spec.first_spec
    if isinstance(spec, SlidingWindowSpec):
        return KvGroup(spec.block_size, window=spec.sliding_window + spec.extra_retained_tokens)
    if isinstance(spec, ChunkedLocalAttentionSpec):
        # A chunk is given back whole when the next begins: never more than a window of that length.
        return KvGroup(spec.block_size, window=spec.attention_chunk_size)
    if isinstance(spec, MambaSpec):  # v1/kv_cache_interface.py, MambaSpec.max_memory_usage_bytes
        states = 2 + spec.num_prefill_checkpoint_blocks if spec.mamba_cache_mode == "align" else 1
        return KvGroup(spec.block_size, fixed_blocks=states + spec.num_speculative_blocks)
    if isinstance(spec, CircularBufferSpec):
        return KvGroup(spec.block_size, fixed_blocks=1)
    return KvGroup(spec.block_size)
