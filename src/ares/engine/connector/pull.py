"""Which pulls are done within a scheduling step, before its forward pass, and which asynchronously.

vLLM's NIXL connector loads asynchronously: the step that admits a request only starts the pull, and the request
computes its first token in the next step. On a busy instance that costs a migrated request one whole step. A pull that
is short compared with a step is better done within the step. vLLM supports such loads for other connectors
("synchronous" in v1/core/sched/scheduler.py, 0.32), failures included.
"""

from typing import Any

from ares.engine.defaults import DEFAULT_PULL_BYTES
from ares.protocol import fields

# The time of a smaller pull is mostly latency and does not count for the speed.
_MIN_TIMED_BYTES = 1 << 20
# Weight of the newest pull in the moving average of the speed.
_SPEED_WEIGHT = 0.2


class PullPolicy:
    """Decides which pulls of one instance are done within a step.

    The first pull from a peer is always asynchronous: it sets up the transport's connection, which takes both sides
    and must not stall the batch.

    Parameters
    ----------
    vllm_config, kv_cache_config, scheduler
        The instance's.
    one_sided
        Whether a pull needs nothing of the peer. On a host without a GPU only shared memory does not
        (`engine/connector/worker.py`): over TCP the peer would have to answer between its steps.

    Attributes
    ----------
    limit_bytes
        Largest pull within a step.
    token_bytes
        Bytes of KV of one token.
    uniform_cache
        Whether all layers share one kind of cache that is pulled without conversion.
    bytes_per_s
        Speed of recent pulls of 1 MiB and more; 0 before the first.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, scheduler: Any, *, one_sided: bool) -> None:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self.limit_bytes = int(extra.get(fields.PULL_WITHIN_STEP_BYTES, DEFAULT_PULL_BYTES))
        self._one_sided = one_sided
        self._tp_size = scheduler.transfer_tp_size
        # Conversions after a pull (host buffers, other layouts) exist only on the asynchronous path.
        self.uniform_cache = (
            len(kv_cache_config.kv_cache_groups) == 1
            and not scheduler.use_host_buffer
            and vllm_config.parallel_config.decode_context_parallel_size == 1
        )
        total = sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors)
        self.token_bytes = total / kv_cache_config.num_blocks / scheduler.block_size
        self._connected: set[str] = set()
        self._timed_within_step = False
        self.bytes_per_s = 0.0

    def within_step(self, params: dict[str, Any], tokens: int) -> bool:
        """Whether a request with these kv_transfer_params pulls this many tokens within the step that admits it."""
        return (
            self.uniform_cache
            and self._one_sided
            and not params.get(fields.PRECOPY)
            and params.get(fields.REMOTE_ENGINE_ID) in self._connected
            and params.get(fields.TP_SIZE) == self._tp_size
            and tokens * self.token_bytes <= self.limit_bytes
        )

    def record(self, params: dict[str, Any] | None, *, failed: bool) -> None:
        """Note how a pull with these kv_transfer_params ended."""
        peer = params.get(fields.REMOTE_ENGINE_ID) if params else None
        if peer is None:
            return
        if failed:
            self._connected.discard(peer)
        else:
            self._connected.add(peer)

    def record_speed(self, stats: Any, *, within_step: bool) -> None:
        """Update the speed of pulls from vLLM's NixlKVConnectorStats of a step.

        The time of an asynchronous pull includes the wait for the end of a step, which notices it: it counts only as
        long as no pull was timed within a step.
        """
        data = stats.data if stats is not None else {}
        for seconds, size in zip(data.get("transfer_duration", ()), data.get("bytes_transferred", ()), strict=True):
            if seconds <= 0 or size < _MIN_TIMED_BYTES or (self._timed_within_step and not within_step):
                continue
            first = not self.bytes_per_s or (within_step and not self._timed_within_step)
            self._timed_within_step |= within_step
            # The average is of seconds per byte, in which slow pulls weigh as much as the time that they take.
            seconds_per_byte = seconds / size
            before = seconds_per_byte if first else 1.0 / self.bytes_per_s
            self.bytes_per_s = 1.0 / (before + _SPEED_WEIGHT * (seconds_per_byte - before))
