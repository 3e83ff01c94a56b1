"""A reply that is used when all of it has come."""

from ares.gateway.pool.connection import BrokenReplyError, Reply


class WholeReply(Reply):
    """Collects one reply; `ready` is set at its end.

    Parameters
    ----------
    most
        Largest body, in bytes.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._status = self._size = 0
        self._parts: list[bytes] = []

    @property
    def body(self) -> bytes:
        """What has come of the body."""
        return b"".join(self._parts)

    def status_received(self, status: int) -> None:
        """Keep the status."""
        self._status = status

    def body_received(self, data: bytes) -> None:
        """Keep a piece of the body, as long as it is not too large."""
        self._size += len(data)
        if self._size <= self._most:
            self._parts.append(data)
        else:
            self._parts.clear()
            self.lost(BrokenReplyError(f"the reply is larger than {self._most} bytes"))
            self.close()

    def arrived(self) -> None:
        """Wait for the rest."""

    def ended(self) -> None:
        """Be ready."""
        if not self.ready.done():
            self.ready.set_result(self._status)
