"""Connections for requests whose replies are read whole, kept from one to the next.

httptools parses HTTP, and its callbacks are public methods here: a general client took a tenth of all that a gateway
does for a request that is to begin.
"""

import asyncio
import contextlib
import time
from typing import Any, cast

import httptools

from ares.gateway.tuning import DEFAULT, Tuning


class BrokenReplyError(Exception):
    """The reply broke off, is not HTTP, or is too large; the message says which."""


class NoReplyError(BrokenReplyError):
    """The connection ended before anything of the reply had come."""


class Connection(asyncio.Protocol):
    """A connection that carries one request after the other.

    Parameters
    ----------
    most
        Largest body of a reply, in bytes.

    Attributes
    ----------
    idle_since
        When the last reply has ended (`time.monotonic`).
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._parts: list[bytes] = []
        self._size = 0
        self._keeps = self._answered = False
        self._reply: asyncio.Future[tuple[int, bytes]] | None = None
        self.idle_since = 0.0

    @property
    def usable(self) -> bool:
        """Whether another request may be sent."""
        return self._keeps and not self._transport.is_closing()

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request; return the status and the body of its reply, BrokenReplyError where there is none."""
        self._keeps = self._answered = False
        self._parts, self._size = [], 0
        reply: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._reply = reply
        if self._transport.is_closing():
            self._fail("the connection was closed")
        self._transport.write(request)
        return await reply

    def close(self) -> None:
        """Close it; what it waits for is given up, and what is not sent yet is dropped."""
        self._transport.abort()

    def _fail(self, why: str) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(BrokenReplyError(why) if self._answered else NoReplyError(why))

    # --- asyncio calls these ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Parse new data."""
        self._answered = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"not a reply of HTTP: {error!r}")
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the reply."""
        self._fail(repr(exc) if exc is not None else "the connection was closed")
        del self._parser  # it refers to this object: with it, both would wait for garbage collection

    # --- httptools calls these ---

    def on_message_begin(self) -> None:
        """Close it where nobody has asked: what comes must not become the answer to the next request."""
        if self._reply is None or self._reply.done():
            self._transport.abort()

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body, as long as it is not too large."""
        self._size += len(body)
        if self._size <= self._most:
            self._parts.append(body)
        else:
            self._parts.clear()
            self._fail(f"the reply is larger than {self._most} bytes")
            self._transport.abort()

    def on_message_complete(self) -> None:
        """Return the reply; one that only announces another is none."""
        status = self._parser.get_status_code()
        if status < 200:
            return
        self._keeps = self._parser.should_keep_alive()
        self.idle_since = time.monotonic()
        if self._reply is not None and not self._reply.done():
            self._reply.set_result((status, b"".join(self._parts)))


class Connections:
    """Those to one server."""

    def __init__(self, host: str, port: int, tls: bool | None, tuning: Tuning = DEFAULT) -> None:
        self._host, self._port, self._tls, self._tuning = host, port, tls, tuning
        # The one that was used last comes first.
        self._idle: list[Connection] = []

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request; return the status and the body of its reply.

        Raises
        ------
        OSError
            No connection can be made, or not in time.
        BrokenReplyError
            There is no whole reply.
        """
        if (kept := self._kept()) is not None:
            # Where the server has closed it meanwhile, nobody has read the request.
            with contextlib.suppress(NoReplyError):
                return await self._ask(kept, request)
        return await self._ask(await self._connect(), request)

    async def _ask(self, connection: Connection, request: bytes) -> tuple[int, bytes]:
        try:
            reply = await connection.ask(request)
        except BaseException:
            connection.close()
            raise
        if connection.usable and len(self._idle) < self._tuning.kept_connections:
            self._idle.append(connection)
        else:
            connection.close()
        return reply

    def close(self) -> None:
        """Close those that are not in use."""
        while self._idle:
            self._idle.pop().close()

    def _kept(self) -> Connection | None:
        """Return one that can be used again, if there is any; close those that cannot."""
        recent = time.monotonic() - self._tuning.kept_connection_s
        while self._idle:
            if (connection := self._idle.pop()).usable and connection.idle_since > recent:
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        made: tuple[Any, Connection]
        async with asyncio.timeout(self._tuning.connect_s):
            made = await asyncio.get_running_loop().create_connection(
                lambda: Connection(self._tuning.reply_bytes), self._host, self._port, ssl=self._tls
            )
        return made[1]
