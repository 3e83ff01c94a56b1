"""The gateway's subscription at an instance, and with it what the instance keeps for the gateway.

An instance that has forgotten a gateway soon frees the KV that is pinned for it (`rpc.ORPHAN_LEASE_S`). A gateway that
was frozen, or cut off from it, must not have that KV pulled any more: freed blocks may have another request's KV. So
KV counts as kept only where the subscription has been alive all the time.
"""

import time

from ares.protocol import messages, rpc

# After this long without a message, in either direction, the instance may have begun to free KV. The rest of the lease
# is for the target, whose first heartbeat comes 5 s after it was asked.
_DOUBTFUL_S = 4.0


class Subscription:
    """One subscription, as the gateway knows it.

    Parameters
    ----------
    gateway
        Name of the gateway.
    interval_s
        Seconds between two reports of the instance.

    Attributes
    ----------
    number
        Changes whenever the subscription may have been interrupted.
    """

    def __init__(self, gateway: str, interval_s: float) -> None:
        self.number = 0
        self._heartbeat = rpc.encode(messages.Subscribe(interval_s, gateway))
        self._doubtful_s = max(_DOUBTFUL_S, 2 * interval_s)
        self._sent = self._received = 0.0

    def heartbeat(self) -> bytes | None:
        """Return what is to be sent now, if anything."""
        now = time.monotonic()
        silent_s = now - self._sent
        if silent_s <= rpc.SUBSCRIPTION_HEARTBEAT_S:
            return None
        self.number += silent_s > _DOUBTFUL_S
        self._sent = now
        return self._heartbeat

    def begin(self) -> None:
        """Begin again, on a new connection."""
        self.number += 1
        self._sent = 0.0

    def received(self, *, greeting: bool) -> None:
        """Note a message; a `greeting` is the first one to a gateway that the instance did not know."""
        self._received = time.monotonic()
        self.number += greeting

    def unbroken(self, since: int) -> bool:
        """Whether it has been alive since it had that number."""
        return since == self.number and time.monotonic() - min(self._sent, self._received) < self._doubtful_s
