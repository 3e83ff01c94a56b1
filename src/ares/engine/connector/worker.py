"""The connector's worker side: NIXL on hosts without a GPU, early handshakes, release of pins."""

import functools
import os
import time
from pathlib import Path
from typing import Any

from ares.engine import identity
from ares.engine.connector import resources
from ares.engine.connector.tracking import ConnectorMetadata
from ares.engine.vllm_api import NixlPullConnectorWorker, base_worker, current_platform
from ares.protocol import rpc

# How long a pull within a step may take before it counts as failed.
_PULL_TIMEOUT_S = 1.0
# NIXL's error where the connection to a peer has broken; the class is that of the installed build (CUDA 12 or 13).
_DISCONNECTED = "nixlRemoteDisconnectError"


class HostWorker(NixlPullConnectorWorker):  # type: ignore[misc]
    """vLLM's pull worker with two fixes for hosts without a GPU, and nothing else."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        if current_platform.device_type != "cpu":
            super().__init__(vllm_config, engine_id, kv_cache_config)
            return
        # On a CPU host vLLM 0.32 does two things that spoil every timing (v1/nixl/base_worker.py): it moves
        # the thread that runs the model to the last core, over the binding that OpenMP was given, and it starts
        # NIXL's progress thread, which spins on another core even when the engine is idle.
        affinity = os.sched_getaffinity(0)
        stock = base_worker.nixl_agent_config
        on_loopback = identity.current().on_loopback
        settings: dict[str, Any] = {"backends": []} if on_loopback else {}
        base_worker.nixl_agent_config = functools.partial(stock, enable_prog_thread=False, **settings)
        try:
            super().__init__(vllm_config, engine_id, kv_cache_config)
        finally:
            base_worker.nixl_agent_config = stock
            os.sched_setaffinity(0, affinity)
        if on_loopback:
            # UCX guards its endpoints against dead peers by default, for which it sends messages through TCP also
            # within a host; after a notification, TCP completes a read only when the peer polls, and an engine polls
            # between steps, an idle one never. Without the guard it takes shared memory, needs no peer for a read, and
            # a read from a dead process fails all the same (process_vm_readv).
            self.nixl_wrapper.create_backend("UCX", {"ucx_error_handling_mode": "none"})
        bind_threads()


def bind_threads() -> None:
    """Bind this process's threads to the instance's cores.

    vLLM does it for OpenMP only where it starts a process for each worker (utils/ompmultiprocessing.py).
    """
    if cores := identity.current().cores:
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores)


class Worker(HostWorker):
    """A worker that also carries out the commands of `ConnectorMetadata`."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        self._released: set[str] = set()
        # Results of polling within a step, reported with those of its end.
        self._results_within_step: list[Any] = []
        super().__init__(vllm_config, engine_id, kv_cache_config)
        resources.register("worker", self._count_resources)

    def _count_resources(self) -> dict[str, int]:
        return {
            "memory_registrations": len(self._registered_descs),
            "remote_engines": len(self._remote_agents),
            "remote_descriptor_lists": len(self.dst_xfer_side_handles),
            "handshakes_under_way": len(self._handshake_futures),
            "pulls_under_way": len(self._recving_metadata),
            "leases": len(self._reqs_to_send),
            "requests_of_leases": len(self._reqs_to_process),
        }

    def start_load_kv(self, metadata: Any) -> None:
        """Start the pulls of this step, then carry out our commands."""
        super().start_load_kv(metadata)
        if not isinstance(metadata, ConnectorMetadata):
            return
        if metadata.pull_now:
            self._wait_for_pulls(metadata.pull_now)
        for peer in metadata.connect:
            self._ensure_handshake(peer.engine_id, peer.host, peer.port, peer.tp_size, peer.dcp_size, peer.pp_size)
        for request_id in metadata.release:
            self._reqs_to_process.discard(request_id)
            # Where it is absent, it was pulled or its lease ended meanwhile, and it has been freed.
            if self._reqs_to_send.pop(request_id, None) is not None:
                self._released.add(request_id)
        # Not freed at once: a target may be about to pull, and extends the lease as any target does while it waits.
        soon = time.perf_counter() + rpc.ORPHAN_LEASE_S
        for request_id in metadata.orphaned & self._reqs_to_send.keys():
            self._reqs_to_send[request_id] = min(self._reqs_to_send[request_id], soon)

    def _wait_for_pulls(self, request_ids: frozenset[str]) -> None:
        """Wait for these pulls: the forward pass that follows reads their KV.

        They are not reported as received, since the scheduler runs them already; blocks that failed to load are (by
        `get_block_ids_with_load_errors`), and the scheduler computes them again.
        """
        deadline = time.monotonic() + _PULL_TIMEOUT_S
        while not request_ids.isdisjoint(self._recving_metadata):
            if time.monotonic() > deadline:
                # A transfer that NIXL releases now has failed; one that it does not is still written, and is awaited.
                deadline += _PULL_TIMEOUT_S
                for request_id in request_ids & self._recving_transfers.keys():
                    self._recving_transfers[request_id] = [
                        handle
                        for handle in self._recving_transfers[request_id]
                        if not self._handle_failed_transfer(request_id, handle, self._recv_failures)
                    ]
            results = super().get_transfer_results()
            results.finished_recving -= request_ids
            results.failed_recving -= request_ids
            self._results_within_step.append(results)
            while not self._ready_requests.empty():
                self._read_blocks_for_req(*self._ready_requests.get_nowait())

    def _log_failure(
        self,
        failure_type: str,
        req_id: str | None,
        msg: str = "",
        error: Any = None,
        meta: Any = None,
        **extra_context: Any,
    ) -> None:
        """Log a failure as vLLM does, and connect anew to a peer whose connection has broken.

        NIXL keeps its metadata of such a peer, and vLLM asks for nothing else (`_cleanup_remote_engines`, 0.32): all
        later transfers would fail.
        """
        super()._log_failure(failure_type, req_id, msg, error, meta, **extra_context)
        if type(error).__name__ != _DISCONNECTED:
            return
        meta = meta or self._recving_metadata.get(req_id)
        peer = extra_context.get("dst_engine_id") or (meta.remote.engine_id if meta and meta.remote else None)
        if peer in self._remote_agents and peer not in self._invalid_remote_engines:
            self._mark_remote_engine_invalid(peer, time.perf_counter())

    def get_transfer_results(self) -> Any:
        """Report released pins as sent, so that the scheduler frees their blocks, once."""
        results = super().get_transfer_results()
        results.finished_sending |= self._released
        self._released = set()
        for within_step in self._results_within_step:
            results.finished_sending |= within_step.finished_sending
            results.finished_recving |= within_step.finished_recving
            results.failed_recving |= within_step.failed_recving
        self._results_within_step = []
        return results
