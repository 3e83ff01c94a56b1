"""KV that waits to be pulled: pinned under a lease, freed exactly once."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ares.protocol import messages, rpc


@dataclass(slots=True, eq=False)
class Pin:
    """The KV of a request that ended here: `tokens` of it in `blocks`, and the model's state after them."""

    id: str
    key: str | None
    tokens: int
    hash: int
    blocks: int
    expiry: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class PinCounts:
    """How many pins were made, and how each ended."""

    made: int = 0
    pulled: int = 0
    released: int = 0
    expired: int = 0


@dataclass(slots=True)
class Pins:
    """The pins of one instance; `free` is called with the blocks of each as it ends."""

    lease_s: float
    free: Callable[[int], None]
    counts: PinCounts = field(default_factory=PinCounts)
    _by_id: dict[str, Pin] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Pin]:
        return iter(list(self._by_id.values()))  # a copy: the channel's thread counts them while the loop changes them

    @property
    def blocks(self) -> int:
        """Blocks that are pinned."""
        return sum(pin.blocks for pin in self._by_id.values())

    def add(self, pin: Pin) -> None:
        """Keep KV until it is pulled or released, or the lease ends."""
        self._by_id[pin.id] = pin
        self.counts.made += 1
        self._lease(pin, self.lease_s)

    def find(self, request_id: str) -> Pin | None:
        """Return the pin of that id."""
        return self._by_id.get(request_id)

    def extend(self, request_ids: list[str]) -> None:
        """Renew leases: the instance that will pull is alive."""
        for pin in (self._by_id[name] for name in request_ids if name in self._by_id):
            self._lease(pin, self.lease_s)

    def pulled(self, pin: Pin) -> None:
        """Free KV that has been pulled."""
        if self._drop(pin):
            self.counts.pulled += 1

    def release(self, key: str) -> bool:
        """Free the KV of a request that will not be pulled; return whether there was such a pin."""
        pin = next((pin for pin in self._by_id.values() if pin.key == key), None)
        if pin is None or not self._drop(pin):
            return False
        self.counts.released += 1
        return True

    def orphan(self, gateway: str) -> None:
        """Shorten the leases of a gateway that is gone; an instance that still waits to pull renews them."""
        soon = asyncio.get_running_loop().time() + rpc.ORPHAN_LEASE_S
        for pin in self._by_id.values():
            if pin.key is not None and messages.owner(pin.key) == gateway and pin.expiry and pin.expiry.when() > soon:
                self._lease(pin, rpc.ORPHAN_LEASE_S)

    def clear(self) -> None:
        """Drop all pins as the instance ends."""
        for pin in self._by_id.values():
            if pin.expiry is not None:
                pin.expiry.cancel()
        self._by_id.clear()

    def _lease(self, pin: Pin, duration_s: float) -> None:
        if pin.expiry is not None:
            pin.expiry.cancel()
        pin.expiry = asyncio.get_running_loop().call_later(duration_s, self._expire, pin)

    def _expire(self, pin: Pin) -> None:
        if self._drop(pin):
            self.counts.expired += 1

    def _drop(self, pin: Pin) -> bool:
        if self._by_id.pop(pin.id, None) is None:
            return False
        if pin.expiry is not None:
            pin.expiry.cancel()
        self.free(pin.blocks)
        return True
