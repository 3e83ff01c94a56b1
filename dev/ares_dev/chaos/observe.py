"""What real engines say of themselves, heard beside the gateway: what it is told may be changed on the way to it."""

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
import zmq
from prometheus_client.parser import text_string_to_metric_families

from ares.gateway.pool.channel import connected
from ares.protocol import messages, rpc
from ares.protocol.fields import INSTANCE_ROUTE, RequestState

_INTERVAL_S = 0.2
# Older news are not of now: it stands still, or is gone.
_SILENT_S = 2.0
# What a connector holds of requests and pins (`Telemetry.resources`); connections between engines stay.
_HELD = (
    *("scheduler.requests", "scheduler.keys", "scheduler.pins", "scheduler.precopy_pins", "scheduler.pulls_to_start"),
    *("worker.pulls_under_way", "worker.leases", "worker.requests_of_leases"),
)
# vLLM's counters (v1/nixl/stats.py, 0.32), and what simulated engines call the like.
_COUNTED = {
    "vllm:nixl_num_kv_expired_reqs_total": "pins_expired",
    "vllm:nixl_num_notifications_after_expiry_total": "pins_pulled_late",
    "vllm:nixl_num_failed_transfers_total": "pulls_failed",
}


@dataclass(slots=True)
class Observer:
    """Follows the telemetry of one instance for as long as `run` runs.

    Attributes
    ----------
    malformed
        Why messages were none: numbers that no instance can have, such as fewer KV blocks in use than none.
    """

    name: str
    url: str
    http: aiohttp.ClientSession
    malformed: list[str] = field(default_factory=list)
    _load: messages.Telemetry | None = None
    _heard: float = 0.0

    async def run(self) -> None:
        """Follow until cancelled; across restarts the address stays."""
        async with self.http.get(f"{self.url}{INSTANCE_ROUTE}") as reply:
            address = (await reply.json())["control_address"]
        socket = connected(address, None)
        asked = 0.0
        try:
            while True:
                if time.monotonic() - asked > rpc.SUBSCRIPTION_HEARTBEAT_S:
                    asked = time.monotonic()
                    with contextlib.suppress(zmq.Again):
                        await socket.send(rpc.encode(messages.Subscribe(_INTERVAL_S)), zmq.NOBLOCK)
                if await socket.poll(int(1000 * _INTERVAL_S)):
                    self.take(await socket.recv())
        finally:
            socket.close()

    def take(self, message: bytes) -> None:
        """Take a message."""
        try:
            event = rpc.decode_event(message)
        except msgspec.DecodeError as error:
            self.malformed.append(f"{self.name}: {error}")
            return
        if isinstance(event, messages.Telemetry):
            self._load, self._heard = event, time.monotonic()

    def counters(self) -> dict[str, Any] | None:
        """Return what simulated engines answer to `/simulate/counters`, as far as real ones tell; None where silent."""
        load = self._load
        if load is None or time.monotonic() - self._heard > _SILENT_S:
            return None
        return {
            "name": self.name,
            "generating": [row.key for row in load.rows if row.state == RequestState.RUNNING],
            "running": load.running,
            "waiting": load.waiting,
            "pinned": load.pinned,
            "kv_blocks_used": load.kv_blocks_used,
            "preemptions": load.preemptions,
            **{name: load.resources[name] for name in _HELD if name in load.resources},
        }

    async def counted(self) -> dict[str, int]:
        """Return what became of pins and pulls, by vLLM's own counters."""
        async with self.http.get(f"{self.url}/metrics") as reply:
            families = list(text_string_to_metric_families(await reply.text()))
        found = [sample for family in families for sample in family.samples]
        counts: dict[str, int] = {}
        for theirs, name in _COUNTED.items():
            values = [sample.value for sample in found if sample.name == theirs]
            if not values:  # renamed: nothing would ever be found wrong
                self.malformed.append(f"{self.name} has no counter {theirs}")
            counts[name] = int(sum(values))
        return counts
