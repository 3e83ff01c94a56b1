"""The lease on deciding moves: of several gateways in front of one pool, one at a time has it.

Each gateway can move its own sessions only, so the gateways take turns: the one with the lease looks at the whole pool,
decides, waits until its moves have ended, so that the next one sees their results, and gives the lease back. No other
store is needed: the decode instances keep the lease, each its part (engine/lease.py). A gateway has it when no instance
that it reaches refuses, and more than half of them grant: two gateways that share an instance never decide at the same
time, and two that share none cannot interfere. A gateway that is alone is granted it every time.
"""

import asyncio
import random
import time
from collections.abc import Iterable
from typing import Any

from ares.gateway.pool.pool import Pool
from ares.gateway.tuning import DEFAULT, Tuning

# Between two attempts, at random, so that two gateways do not keep taking half of the instances each.
_RETRY_PAUSE_S = (0.03, 0.12)


class Lease:
    """The lease, as one gateway sees it.

    Parameters
    ----------
    pool
        Its decode instances keep the lease.
    name, tuning
        The gateway's.

    Attributes
    ----------
    holder
        The gateway that had it at the last attempt; empty where it was granted.
    missed
        Periods in a row without a turn.
    """

    def __init__(self, pool: Pool, name: str, tuning: Tuning = DEFAULT) -> None:
        self.name = name
        self.holder = ""
        self.missed = 0
        self._pool = pool
        self._tuning = tuning
        # How often it was acquired without having been released: for moves, and to close an instance, at a time.
        self._uses = 0
        self._since: float | None = None
        self._asking = asyncio.Lock()
        self._moves: set[asyncio.Task[Any]] = set()

    async def acquire(self, within_s: float) -> bool:
        """Acquire the lease, or extend it; return whether it was granted within this time."""
        until = time.monotonic() + within_s
        while not await self._taken():
            pause_s = random.uniform(*_RETRY_PAUSE_S)  # noqa: S311 - no secret
            if time.monotonic() + pause_s > until:
                self.missed += 1
                return False
            await asyncio.sleep(pause_s)
        self.missed = 0
        return True

    async def release(self, moves: Iterable[asyncio.Task[Any]] = ()) -> None:
        """Release the lease when these moves have ended, unless it is still used otherwise: once for each `acquire`."""
        if self._since is None:
            return
        self._moves.update(moves)
        if self._moves:
            until = self._since + self._tuning.lease_turn_s
            await asyncio.wait(self._moves, timeout=max(0.0, until - time.monotonic()))
        self._uses -= 1
        if self._uses <= 0:
            await self.end()

    async def end(self) -> None:
        """Release the lease whatever it is used for."""
        self._uses, self._since = 0, None
        self._moves.clear()
        await self._end()

    async def _taken(self) -> bool:
        """Ask once; return whether it is ours, once more than before."""
        async with self._asking:
            if await self._granted():
                self._uses += 1
                self._since = self._since or time.monotonic()
                return True
            if not self._uses:
                await self._end()  # the parts that were granted would block others
            return False

    async def _granted(self) -> bool:
        # Where none decodes, the others: there is a role to change.
        keeping = self._pool.decode_instances or self._pool.instances
        reachable = [i for i in keeping if i.health.healthy]
        # Instances of an earlier version count as granting: their gateways all decide for themselves.
        keepers = [i for i in reachable if i.state.hello is not None and i.state.hello.leases]
        ttl_s, answer_s = self._tuning.lease_ttl_s, self._tuning.lease_answer_s
        answers = await asyncio.gather(*(i.control.lease(self.name, ttl_s, answer_s) for i in keepers))
        self.holder = next((a.holder for a in answers if a is not None and not a.granted), "")
        silent = answers.count(None)
        return not self.holder and (2 * silent < len(reachable) or not reachable)

    async def _end(self) -> None:
        for instance in self._pool.instances:  # also those that decode no more
            if instance.health.healthy:
                await instance.control.end_lease(self.name)
