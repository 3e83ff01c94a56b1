"""The connections to an instance, kept from one request to the next."""

import asyncio
import bisect
import contextlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ares.gateway.pool.connection import Connection, NoReplyError, Reply
from ares.gateway.tuning import DEFAULT, Tuning

ReplyT = TypeVar("ReplyT", bound=Reply)


class Connections:
    """Those to one server."""

    def __init__(self, host: str, port: int, tls: bool | None, tuning: Tuning = DEFAULT) -> None:
        self._host, self._port, self._tls, self._tuning = host, port, tls, tuning
        # The one that was used last comes last.
        self._idle: list[Connection] = []
        # Closes those that were idle for too long.
        self._expiry: asyncio.TimerHandle | None = None

    async def send(self, request: bytes, make: Callable[[], ReplyT]) -> ReplyT:
        """Send a request; return its reply when it is ready.

        Parameters
        ----------
        make
            Makes what reads the reply.

        Raises
        ------
        OSError
            No connection can be made, or not in time.
        BrokenReplyError
            There is no reply.
        """
        if (kept := self._kept()) is not None:
            # Where the server has closed it meanwhile, nobody has read the request.
            with contextlib.suppress(NoReplyError):
                return await self._send(kept, request, make())
        return await self._send(await self._connect(), request, make())

    async def _send(self, connection: Connection, request: bytes, reply: ReplyT) -> ReplyT:
        connection.send(request, reply)
        try:
            await reply.ready
        except BaseException:
            reply.close()
            raise
        return reply

    def close(self) -> None:
        """Close those that are not in use."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None  # one that is in use now may become idle later
        while self._idle:
            self._idle.pop().abort()

    def _keep(self, connection: Connection) -> None:
        if len(self._idle) == self._tuning.kept_connections:
            connection.abort()
            return
        self._idle.append(connection)
        if self._expiry is None:
            self._expire_at(connection.idle_since + self._tuning.kept_connection_s)

    def _expire_at(self, time_s: float) -> None:
        self._expiry = asyncio.get_running_loop().call_later(time_s - time.monotonic(), self._expire)

    def _expire(self) -> None:
        self._expiry = None
        recent = time.monotonic() - self._tuning.kept_connection_s
        expired = bisect.bisect_right(self._idle, recent, key=lambda connection: connection.idle_since)
        for connection in self._idle[:expired]:
            connection.abort()
        del self._idle[:expired]
        if self._idle:
            self._expire_at(self._idle[0].idle_since + self._tuning.kept_connection_s)

    def _kept(self) -> Connection | None:
        """Return one that can be used again, if there is any; close those that cannot."""
        recent = time.monotonic() - self._tuning.kept_connection_s
        while self._idle:
            if (connection := self._idle.pop()).usable and connection.idle_since > recent:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> Connection:
        made: tuple[Any, Connection]
        async with asyncio.timeout(self._tuning.connect_s):
            made = await asyncio.get_running_loop().create_connection(
                lambda: Connection(self._keep), self._host, self._port, ssl=self._tls
            )
        return made[1]
