"""Which pulls happen within a scheduling step, before its forward pass, instead of beside it.

vLLM's NIXL connector loads asynchronously: the step that admits a request only starts the pull, and the request
computes its first token in the next step. On a busy instance that costs a moved request one whole step. A pull that is
short against a step is better done within the step. vLLM knows such loads from other connectors ("synchronous" in
v1/core/sched/scheduler.py, 0.32), failures included.
"""

from typing import Any

from ares.engine.defaults import DEFAULT_PULL_BYTES
from ares.engine.vllm_api import current_platform
from ares.protocol import fields

# A smaller pull tells the latency of a transfer, not its speed.
_TELLING_BYTES = 1 << 20
# Weight of the newest pull in the moving average of their speed.
_SPEED_WEIGHT = 0.2


class PullPolicy:
    """Decides for one instance.

    The first pull from a peer is always asynchronous: it brings the transport's connection up, which takes both sides
    and must not hold the batch.

    Attributes
    ----------
    limit_bytes
        Largest pull within a step.
    token_bytes
        KV of one token.
    plain
        Whether all layers share one kind of cache that is pulled as it is, without conversion.
    bytes_per_s
        Speed of recent pulls of 1 MiB and more; 0 before the first.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, scheduler: Any) -> None:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self.limit_bytes = int(extra.get(fields.PULL_WITHIN_STEP_BYTES, DEFAULT_PULL_BYTES))
        self._host = scheduler.side_channel_host
        self._tp_size = scheduler.transfer_tp_size
        # Conversions after a pull (host buffers, other layouts) are left to the asynchronous path.
        self.plain = (
            len(kv_cache_config.kv_cache_groups) == 1
            and not scheduler.use_host_buffer
            and vllm_config.parallel_config.decode_context_parallel_size == 1
        )
        total = sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors)
        self.token_bytes = total / kv_cache_config.num_blocks / scheduler.block_size
        self._proven: set[str] = set()
        self._timed_within_step = False
        self.bytes_per_s = 0.0

    def within_step(self, params: dict[str, Any], tokens: int) -> bool:
        """Whether a request with these kv_transfer_params pulls so many tokens within the step that admits it."""
        # Without a GPU only shared memory is one-sided; over TCP the peer would have to answer between its steps.
        one_sided = current_platform.device_type != "cpu" or params.get(fields.REMOTE_HOST) == self._host
        return (
            self.plain
            and one_sided
            and not params.get(fields.PRECOPY)
            and params.get(fields.REMOTE_ENGINE_ID) in self._proven
            and params.get(fields.TP_SIZE) == self._tp_size
            and tokens * self.token_bytes <= self.limit_bytes
        )

    def learn(self, params: dict[str, Any] | None, *, failed: bool) -> None:
        """Remember how a pull from a peer went."""
        peer = params.get(fields.REMOTE_ENGINE_ID) if params else None
        if peer is None:
            return
        if failed:
            self._proven.discard(peer)
        else:
            self._proven.add(peer)

    def measure(self, stats: Any, *, within_step: bool) -> None:
        """Learn the speed of pulls from vLLM's NixlKVConnectorStats of a step.

        A pull beside the steps is timed until a step ends and looks at it, which makes it seem slow: it counts only as
        long as none was timed within a step.
        """
        data = stats.data if stats is not None else {}
        for seconds, size in zip(data.get("transfer_duration", ()), data.get("bytes_transferred", ()), strict=True):
            if seconds <= 0 or size < _TELLING_BYTES or (self._timed_within_step and not within_step):
                continue
            first = not self.bytes_per_s or (within_step and not self._timed_within_step)
            self._timed_within_step |= within_step
            # An average of seconds a byte, so that slow pulls weigh as much as they take.
            pace = seconds / size
            before = pace if first else 1.0 / self.bytes_per_s
            self.bytes_per_s = 1.0 / (before + _SPEED_WEIGHT * (pace - before))
