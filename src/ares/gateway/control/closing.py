"""Only one gateway at a time may drain an instance or change its role.

Each gateway checks first that another instance does the same work. Two gateways that checked at the same time would
close the last two instances of a role, so this is done under the controller's lease, which is kept until the other
gateways can see the result.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from ares.gateway.control.lease import Lease
from ares.gateway.tuning import DEFAULT, Tuning


class ClosingError(Exception):
    """An instance cannot be closed for some work; `status` is the HTTP status of the reply, `code` one word for why."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Closing:
    """The turn of one gateway to close instances.

    Parameters
    ----------
    lease
        The gateway's part in the controller's lease.
    spawn
        Runs a coroutine in the background of the gateway.
    interval_s
        Seconds between two reports of an instance.
    tuning
        The gateway's times and limits.
    """

    def __init__(
        self,
        lease: Lease,
        spawn: Callable[[Coroutine[Any, Any, Any]], object],
        interval_s: float,
        tuning: Tuning = DEFAULT,
    ) -> None:
        self._lease, self._spawn = lease, spawn
        self._interval_s = interval_s
        self._tuning = tuning
        # The lease does not keep the tasks of one gateway apart.
        self._own = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the turn, and keep it until the others know what was done; ClosingError where it does not come."""
        async with self._own:
            if not await self._lease.acquire(self._tuning.closing_lease_s):
                holder = f" ({self._lease.holder})" if self._lease.holder else ""
                raise ClosingError(503, "another_decides", f"another gateway{holder} decides just now; try again")
            try:
                yield
            finally:
                self._spawn(self._release())

    async def _release(self) -> None:
        # An instance reports the change to all at once, one of an earlier version with its next report.
        await asyncio.sleep(min(2 * self._interval_s, self._tuning.lease_ttl_s / 2))
        await self._lease.release()
