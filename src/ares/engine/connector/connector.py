"""The connector that vLLM loads (`kv_connector_module_path`): stock NIXL pull with our two sides."""

from collections.abc import Iterable
from typing import Any

from ares.engine import identity, parallel
from ares.engine.connector.scheduler import Scheduler
from ares.engine.connector.worker import Worker
from ares.engine.logs import follow_vllm
from ares.engine.vllm_api import KVConnectorRole, NixlBaseConnector, NixlPullConnector

# vLLM imports this module while it makes its configuration (config/vllm.py, 0.32). A `vllm serve` with this connector
# would fail all the same, but only when its model is loaded.
identity.current()


class NixlConnector(NixlPullConnector):  # type: ignore[misc]
    """Stock NIXL pull connector plus the hand-over of running requests.

    It keeps the stock name on purpose: vLLM 0.32 asks for "NixlConnector" by name in a few places (context
    parallelism and hybrid layouts), and a renamed subclass would skip them.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        follow_vllm()
        # Where vLLM was given them by another way than the arguments of `ares worker`, which refuses them earlier.
        if (reason := parallel.unsupported(vllm_config.parallel_config)) is not None:
            raise ValueError(reason)
        # Not the parent's: it would make the stock sides too, and so two NIXL agents for one instance.
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = Scheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            self.connector_worker = Worker(vllm_config, self.engine_id, kv_cache_config)

    def take_events(self) -> Iterable[Any]:
        """Note the end of a step: vLLM asks for KV events when it has added the step's tokens to the outputs.

        v1/core/sched/scheduler.py, `update_from_output`, 0.32.
        """
        self.connector_scheduler.step_completed()
        events: Iterable[Any] = super().take_events()
        return events

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Give the scheduler side the KV cache whose use it reports, and whose blocks it pins."""
        self.connector_scheduler.kv_cache_manager = kv_cache_manager
