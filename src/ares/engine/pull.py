"""Which pulls happen within a scheduling step, before its forward pass, instead of beside it.

vLLM's NIXL connector loads asynchronously: the step that admits a request only starts the pull, and the request
computes its first token in the next step. On a busy instance that costs a moved request one whole step. A pull that is
short against a step is better done within the step. vLLM knows such loads from other connectors ("synchronous" in
v1/core/sched/scheduler.py, 0.32), failures included.
"""

from typing import Any

from ares.engine.vllm_names import current_platform

# Largest pull within a step, by default: 20 ms of other requests' time at 3 GB/s, below 3 ms at the speed of RDMA.
_DEFAULT_BYTES = 64 << 20


class PullPolicy:
    """Decides for one instance.

    The first pull from a peer is always asynchronous: it brings the transport's connection up, which takes both sides
    and must not hold the batch.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, scheduler: Any) -> None:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._limit_bytes = int(extra.get("ares_pull_within_step_bytes", _DEFAULT_BYTES))
        self._host = scheduler.side_channel_host
        self._tp_size = scheduler.transfer_tp_size
        # Conversions after a pull (host buffers, other layouts) are left to the asynchronous path.
        self._plain = (
            len(kv_cache_config.kv_cache_groups) == 1
            and not scheduler.use_host_buffer
            and vllm_config.parallel_config.decode_context_parallel_size == 1
        )
        total = sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors)
        self._token_bytes = total / kv_cache_config.num_blocks / scheduler.block_size
        self._proven: set[str] = set()

    def within_step(self, params: dict[str, Any], tokens: int) -> bool:
        """Whether a request with these kv_transfer_params pulls so many tokens within the step that admits it."""
        # Without a GPU only shared memory is one-sided; over TCP the peer would have to answer between its steps.
        one_sided = current_platform.device_type != "cpu" or params.get("remote_host") == self._host
        return (
            self._plain
            and one_sided
            and params.get("remote_engine_id") in self._proven
            and params.get("tp_size") == self._tp_size
            and tokens * self._token_bytes <= self._limit_bytes
        )

    def learn(self, params: dict[str, Any] | None, *, failed: bool) -> None:
        """Remember how a pull from a peer went."""
        peer = params.get("remote_engine_id") if params else None
        if peer is None:
            return
        if failed:
            self._proven.discard(peer)
        else:
            self._proven.add(peer)
