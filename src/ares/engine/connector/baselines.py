"""Connectors to measure ours against (`ares bench overhead`)."""

from typing import Any

from ares.engine.connector.worker import HostWorker
from ares.engine.vllm_api import KVConnectorRole, NixlBaseConnector, NixlPullConnector, NixlPullConnectorScheduler


class NixlConnector(NixlPullConnector):  # type: ignore[misc]
    """Stock NIXL pull connector; on a host without a GPU with our two fixes, without which timings mean nothing."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = NixlPullConnectorScheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            self.connector_worker = HostWorker(vllm_config, self.engine_id, kv_cache_config)
