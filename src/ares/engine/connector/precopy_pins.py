"""Live pre-copy at its source: full blocks of running requests, pinned while another instance pulls them.

A full block of a running request is never written again. Its reference count is raised (vLLM's BlockPool.touch, as for
a prefix-cache hit), and the workers hold a lease on it under an id that no request has: what frees it is what frees
the KV of a finished prefill, the pull's notification, a release, or the end of the lease.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

from ares.engine.vllm_api import RequestStatus
from ares.protocol import fields, messages


@dataclass(slots=True)
class PinnedCopy:
    """Pinned blocks in the shape of a finished prefill: what the stock connector reads of a Request."""

    request_id: str
    pin: str
    blocks: list[Any]
    num_computed_tokens: int
    status: RequestStatus = RequestStatus.FINISHED_LENGTH_CAPPED
    kv_transfer_params: dict[str, Any] = field(default_factory=lambda: {fields.DO_REMOTE_DECODE: True})

    @property
    def block_ids(self) -> list[int]:
        """Return vLLM's ids of the blocks."""
        return [block.block_id for block in self.blocks]


class Copies:
    """The pins of one instance that are not of a finished request."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._numbers = itertools.count(1)
        self._held: dict[str, PinnedCopy] = {}

    def __len__(self) -> int:
        return len(self._held)

    def pin(self, manager: Any, request: Any, name: str, most: int) -> PinnedCopy | None:
        """Pin the full computed blocks of a running request, at most `most` tokens; None where there are none.

        Parameters
        ----------
        manager
            vLLM's KVCacheManager.
        request
            vLLM's Request.
        name
            What the gateway calls the pin.
        """
        # What a step in flight computes is not there yet.
        computed = request.num_computed_tokens - request.num_in_flight_tokens
        count = max(0, min(computed, most)) // self._block_size
        blocks = list(manager.get_blocks(request.request_id).blocks[0][:count])
        if not blocks or any(block.is_null for block in blocks):
            return None
        manager.block_pool.touch(blocks)
        pinned = PinnedCopy(f"ares-copy-{next(self._numbers)}", name, blocks, count * self._block_size)
        self._held[pinned.request_id] = pinned
        return pinned

    def ids(self, name: str) -> list[str]:
        """Return the ids of the leases on the pin called `name`."""
        return [pinned.request_id for pinned in self._held.values() if pinned.pin == name]

    def ids_of(self, gateway: str) -> list[str]:
        """Return the ids of the leases on everything that is pinned for a gateway."""
        return [pinned.request_id for pinned in self._held.values() if messages.owner(pinned.pin) == gateway]

    def free(self, manager: Any, ended: set[str]) -> None:
        """Free the pins whose lease is among `ended`, and take these out: vLLM knows no request of that id."""
        for request_id in ended & self._held.keys():
            ended.discard(request_id)
            # The last block first, as vLLM frees a request: without its head the rest of a prefix is useless.
            manager.block_pool.free_blocks(reversed(self._held.pop(request_id).blocks))
