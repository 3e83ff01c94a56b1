"""An instance's part of the controller's lease: only one gateway at a time decides migrations.

Gateways agree on the controller without a shared store. Each instance grants its part of the lease to one
gateway; the gateway that holds the parts of all instances that answer is the controller (gateway/control/lease.py). A
gateway that dies loses them when its connections break, or when they expire.
"""

from ares.protocol import messages, rpc


class ControllerLease:
    """Granted to one holder at a time. Times are those of `time.monotonic`."""

    def __init__(self) -> None:
        self._holder = ""
        self._until = 0.0

    def request(self, asked: messages.Lease, now: float) -> messages.LeaseResult:
        """Grant the lease, extend it, take it back, or refuse it."""
        if now >= self._until:
            self._holder = ""
        granted = asked.holder != "" and self._holder in ("", asked.holder)
        if granted:
            ttl_s = min(rpc.LONGEST_LEASE_S, max(0.0, asked.ttl_s))  # in this order NaN gives 0
            self._holder, self._until = (asked.holder, now + ttl_s) if ttl_s else ("", 0.0)
        return messages.LeaseResult(asked.call, self._holder, granted)

    def release(self, holder: str) -> None:
        """End the lease of a holder that has disconnected; others keep theirs."""
        if self._holder == holder:
            self._holder = ""
