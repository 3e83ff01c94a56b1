"""Bringing the KV events that an instance has kept: in parts, and from one instance of a pool at a time.

An instance keeps up to 16 MiB of them, and to take these costs a third of a second. If all instances sent them at once,
as when a gateway starts, no stream and no telemetry would be handled for so long that the instances forgot it.
"""

import asyncio
from collections.abc import Awaitable, Callable

from ares.protocol import messages, rpc

# After each part, streams and telemetry get this many times as long as it took.
_PAUSES = 4.0
# Longest answer, and how many in a row may be missing: an earlier version does not answer where it has kept nothing.
ANSWER_S = 2.0
_TRIES = 3


class KvReplay:
    """The replay of one instance.

    Parameters
    ----------
    turn
        Shared by the instances of a pool.
    send
        Sends the instance a message.
    """

    def __init__(self, turn: asyncio.Lock, send: Callable[[bytes], Awaitable[None]]) -> None:
        self._turn, self._send = turn, send
        self._wanted: int | None = None
        self._answer: asyncio.Future[float] | None = None
        self._task: asyncio.Task[None] | None = None

    def ask(self, since: int) -> None:
        """Ask for the batches from a number on, when it is this instance's turn."""
        self._wanted = since
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    def taken(self, took_s: float) -> None:
        """Note that a message was taken, and for how long that stopped everything else."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(took_s)

    def stop(self) -> None:
        """Ask for nothing more, until it is asked again."""
        self._wanted = None
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        unanswered = 0
        while self._wanted is not None and unanswered < _TRIES:
            async with self._turn:
                since, self._wanted = self._wanted, None
                took_s = await self._bring(since)
                if took_s is not None:
                    unanswered = 0
                    await asyncio.sleep(_PAUSES * took_s)
                    continue
            unanswered += 1
            self._wanted = since if self._wanted is None else self._wanted

    async def _bring(self, since: int) -> float | None:
        """Bring one part; return for how many seconds it was taken, None where no answer has come."""
        self._answer = asyncio.get_running_loop().create_future()
        await self._send(rpc.encode(messages.FollowKvEvents(since, paced=True)))
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._answer
        except TimeoutError:
            return None
