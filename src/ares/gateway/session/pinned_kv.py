"""KV that an instance keeps for a session until it is pulled: made, kept, and freed exactly once (I5)."""

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Any

from ares.gateway.pool.compatibility import Values
from ares.gateway.pool.instance import Instance
from ares.gateway.tuning import DEFAULT


@dataclass(frozen=True, slots=True)
class Pin:
    """KV that an instance keeps under `key` until it is pulled.

    Attributes
    ----------
    since
        Number of our subscription there when it was pinned.
    kept_s
        How long it is sure to be kept.
    pinned_at
        Time of `time.monotonic`.
    """

    instance: Instance
    key: str
    since: int
    kept_s: float
    pinned_at: float = field(default_factory=time.monotonic)

    @classmethod
    def at(cls, instance: Instance, key: str, kept_s: float) -> "Pin":
        """Return a pin that begins now, or as soon as the instance has computed the KV."""
        return cls(instance, key, instance.subscription.number, kept_s)

    @property
    def kept(self) -> bool:
        """Whether it is certain that the instance still has it."""
        return time.monotonic() - self.pinned_at <= self.kept_s and self.instance.subscription.unbroken(self.since)


class PinnedKV:
    """The pin that waits for a session, if there is one.

    It ends in one of three ways: a command to the instance frees it; the request that pulls it does, from the moment at
    which that request is sent, also where it is aborted; or its lease ends.

    Parameters
    ----------
    kept_s
        How long an instance is sure to keep it.
    """

    def __init__(self, kept_s: float = DEFAULT.pinned_kv_kept_s) -> None:
        self._kept_s = kept_s
        self._pin: Pin | None = None
        self._closed = False
        self._releases: set[asyncio.Task[Any]] = set()

    @property
    def kept(self) -> bool:
        """Whether there is a pin, and it is certain that the instance still has it."""
        return self._pin is not None and self._pin.kept

    @property
    def instance(self) -> Instance | None:
        """Which instance keeps it; None where there is no pin."""
        return self._pin.instance if self._pin is not None else None

    @property
    def settings(self) -> Values | None:
        """What the instance that keeps it runs with; None where there is no pin, or that is not known."""
        return self._pin.instance.state.settings if self._pin is not None else None

    def add(self, instance: Instance, key: str) -> None:
        """Note KV that is pinned, or will be; an older pin is freed."""
        if self._pin is not None and self._pin.key != key:
            self.free()
        self._pin = Pin.at(instance, key, self._kept_s)

    def confirm(self) -> None:
        """Note that the KV has been pinned just now."""
        if self._pin is not None:
            self._pin = replace(self._pin, pinned_at=time.monotonic())

    def take(self) -> Pin | None:
        """Give the pin to a request that is about to pull it; that request frees it."""
        pin, self._pin = self._pin, None
        return pin

    def put_back(self, pin: Pin | None) -> None:
        """Take a pin back whose request did not start."""
        if pin is None:
            return
        if self._closed or self._pin is not None:
            self._release(pin)
        else:
            self._pin = pin

    def free(self) -> None:
        """Let the instance free it: it will not be pulled."""
        if (pin := self.take()) is not None:
            self._release(pin)

    def close(self) -> None:
        """Free it; what is put back from now on is freed at once."""
        self._closed = True
        self.free()

    def _release(self, pin: Pin) -> None:
        task = asyncio.ensure_future(pin.instance.control.release(pin.key))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)
