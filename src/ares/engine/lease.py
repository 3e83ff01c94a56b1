"""An instance's part of the lease on deciding moves: one gateway at a time, and not for long.

Gateways need no store beside their pool to agree on who decides. Each instance grants its part to one of them; who has
those of all the instances that answer is the controller (gateway/control/lease.py). One that dies loses it with its
connection, or when the time is over.
"""

from ares.protocol import messages, rpc


class Lease:
    """Granted to one holder at a time. Times are those of `time.monotonic`."""

    def __init__(self) -> None:
        self._holder = ""
        self._until = 0.0

    def ask(self, wanted: messages.Lease, now: float) -> messages.LeaseResult:
        """Grant the lease, extend it, take it back, or refuse it."""
        if now >= self._until:
            self._holder = ""
        granted = wanted.holder != "" and self._holder in ("", wanted.holder)
        if granted:
            ttl_s = min(rpc.LONGEST_LEASE_S, max(0.0, wanted.ttl_s))  # this order: 0 for NaN
            self._holder, self._until = (wanted.holder, now + ttl_s) if ttl_s else ("", 0.0)
        return messages.LeaseResult(wanted.call, self._holder, granted)

    def end(self, holder: str) -> None:
        """Take it from a holder who is gone."""
        if self._holder == holder:
            self._holder = ""
