"""The gateway's subscription at an instance; the instance keeps KV for the gateway only while it lasts.

An instance that has forgotten a gateway soon frees the KV that is pinned for it (`messages.ORPHAN_LEASE_S`). A gateway
that was frozen, or cut off from it, must not have that KV pulled any more: freed blocks hold the KV of other requests.
So KV counts as kept only where the subscription has been alive all the time.
"""

import time

from ares.protocol import messages

_HEARTBEAT_S = messages.SUBSCRIPTION_TTL_S / 5
# Silence, in either direction, after which the instance may have begun to free KV. The rest of the lease is for the
# target, whose first heartbeat comes 5 s after its request.
_DOUBTFUL_S = 4.0


class Subscription:
    """The gateway's end of the subscription.

    Parameters
    ----------
    gateway
        Name of the gateway.
    interval_s
        Seconds between two reports of the instance.

    Attributes
    ----------
    number
        Increases whenever the subscription may have been interrupted.
    """

    def __init__(self, gateway: str, interval_s: float) -> None:
        self.number = 0
        self._heartbeat = messages.encode(messages.Subscribe(interval_s, gateway))
        self._doubtful_s = max(_DOUBTFUL_S, 2 * interval_s)
        self._sent = self._heard = 0.0

    def heartbeat(self) -> bytes | None:
        """Return what is to be sent now, if anything."""
        now = time.monotonic()
        silent_s = now - self._sent
        if silent_s <= _HEARTBEAT_S:
            return None
        self.number += silent_s > _DOUBTFUL_S
        self._sent = now
        return self._heartbeat

    def begin(self) -> None:
        """Start over, on another connection."""
        self.number += 1
        self._sent = 0.0

    def heard(self, *, again: bool) -> None:
        """Note a message; `again`: the instance had forgotten this gateway, or never known it."""
        self._heard = time.monotonic()
        self.number += again

    def unbroken(self, since: int) -> bool:
        """Whether it has been alive since `number` had that value."""
        return since == self.number and time.monotonic() - min(self._sent, self._heard) < self._doubtful_s
