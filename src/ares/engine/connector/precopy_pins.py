"""Pre-copy at its source: full KV blocks of running requests, pinned while another instance pulls them.

A full block of a running request is never written again. Its reference count is raised (vLLM's BlockPool.touch, as for
a prefix-cache hit), and the workers hold a lease on it under an id that no request has. It is freed like the KV of a
finished prefill: by the pull's notification, by a release, or at the end of the lease.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

from ares.engine.vllm_api import RequestStatus
from ares.protocol import fields, messages


@dataclass(slots=True)
class PrecopyPin:
    """Pinned blocks in the form of a finished prefill: the attributes of a Request that the stock connector reads."""

    request_id: str
    name: str
    blocks: list[Any]
    num_computed_tokens: int
    status: RequestStatus = RequestStatus.FINISHED_LENGTH_CAPPED
    kv_transfer_params: dict[str, Any] = field(default_factory=lambda: {fields.DO_REMOTE_DECODE: True})

    @property
    def block_ids(self) -> list[int]:
        """Return vLLM's ids of the blocks."""
        return [block.block_id for block in self.blocks]


class PrecopyPins:
    """The pins of one instance whose requests still run."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._numbers = itertools.count(1)
        self._pins: dict[str, PrecopyPin] = {}

    def __len__(self) -> int:
        return len(self._pins)

    def pin(self, manager: Any, request: Any, name: str, most: int) -> PrecopyPin | None:
        """Pin the full computed blocks of a running request, at most `most` tokens; None where there are none.

        Parameters
        ----------
        manager
            vLLM's KVCacheManager.
        request
            vLLM's Request.
        name
            The gateway's name of the pin.
        """
        # The tokens of a step in flight have no KV yet.
        computed = request.num_computed_tokens - request.num_in_flight_tokens
        count = max(0, min(computed, most)) // self._block_size
        blocks = list(manager.get_blocks(request.request_id).blocks[0][:count])
        if not blocks or any(block.is_null for block in blocks):
            return None
        manager.block_pool.touch(blocks)
        pin = PrecopyPin(f"ares-copy-{next(self._numbers)}", name, blocks, count * self._block_size)
        self._pins[pin.request_id] = pin
        return pin

    def ids(self, name: str) -> list[str]:
        """Return the ids of the leases on the pin called `name`."""
        return [pin.request_id for pin in self._pins.values() if pin.name == name]

    def ids_of(self, gateway: str) -> list[str]:
        """Return the ids of the leases on all pins of a gateway."""
        return [pin.request_id for pin in self._pins.values() if messages.owner(pin.name) == gateway]

    def free(self, manager: Any, ended: set[str]) -> None:
        """Free the pins whose lease is among `ended`, and remove these ids: vLLM knows no requests with them."""
        for request_id in ended & self._pins.keys():
            ended.discard(request_id)
            # The last block first, as vLLM frees a request: without its head the rest of a prefix is useless.
            manager.block_pool.free_blocks(reversed(self._pins.pop(request_id).blocks))
