"""A connection to an instance: it carries one request after the other, and gives each reply to what reads it.

A read may bring a single token, and the overhead of a general HTTP client for each read would exceed all other work for
the token: httptools parses HTTP, and its callbacks are public methods here.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import httptools


class BrokenReplyError(Exception):
    """The reply broke off, is not HTTP, or is too large; the message says which."""


class NoReplyError(BrokenReplyError):
    """The connection ended before anything of the reply had come."""


class Reply(ABC):
    """What reads one reply.

    Attributes
    ----------
    ready
        Set to the status when the reply can be used, or to the error for which there is none.
    connection
        That it comes on; None before it is asked for, and when it has ended.
    """

    __slots__ = ("__weakref__", "connection", "ready")

    def __init__(self) -> None:
        self.ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.connection: Connection | None = None

    @abstractmethod
    def status_received(self, status: int) -> None:
        """Take the status."""

    @abstractmethod
    def body_received(self, data: bytes) -> None:
        """Take a piece of the body."""

    @abstractmethod
    def ended(self) -> None:
        """Note that all of it has come."""

    @abstractmethod
    def arrived(self) -> None:
        """Note that all that one read has brought was given."""

    def lost(self, error: BrokenReplyError) -> None:
        """Note that no more will come."""
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # it may never be asked for

    def close(self) -> None:
        """Close the connection where the reply has not ended: what is not sent yet of the request is dropped."""
        if self.connection is not None:
            self.connection.abort()


class Connection(asyncio.Protocol):
    """One connection.

    Parameters
    ----------
    on_free
        Called when a reply has ended after which another request may be sent.

    Attributes
    ----------
    idle_since
        When the last reply has ended (`time.monotonic`).
    """

    def __init__(self, on_free: "Callable[[Connection], object]" = lambda _: None) -> None:
        self._on_free = on_free
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._reply: Reply | None = None
        self._answered = self._paused = False
        self.idle_since = 0.0

    @property
    def usable(self) -> bool:
        """Whether it is open."""
        return not self._transport.is_closing()

    def send(self, request: bytes, reply: Reply) -> None:
        """Send a request, the reply to which is read by `reply`; there is none under way."""
        self._reply, reply.connection = reply, self
        self._answered = False
        if self._transport.is_closing():
            self._lose("the connection was closed")
        else:
            self._transport.write(request)

    def pause_reading(self) -> None:
        """Have the server wait."""
        self._paused = True
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on after `pause_reading`."""
        self._paused = False
        self._transport.resume_reading()

    def abort(self) -> None:
        """Close it; what is not sent yet is dropped."""
        self._transport.abort()

    def _lose(self, why: str) -> None:
        if (reply := self._detach()) is not None:
            reply.lost(BrokenReplyError(why) if self._answered else NoReplyError(why))

    def _detach(self) -> Reply | None:
        """Return the reply under way, which is none any more: without a cycle of both, none waits for collection."""
        reply, self._reply = self._reply, None
        if reply is not None:
            reply.connection = None
        return reply

    # --- asyncio calls these ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Parse new data."""
        reply, self._answered = self._reply, True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._lose(f"not a reply of HTTP: {error!r}")
            self._transport.abort()
        if reply is not None:
            reply.arrived()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the reply."""
        self._lose(repr(exc) if exc is not None else "the connection was closed")
        del self._parser  # it refers to this object: with it, both would wait for garbage collection

    # --- httptools calls these ---

    def on_message_begin(self) -> None:
        """Close it where nobody has asked: what comes must not become the answer to the next request."""
        if self._reply is None:
            self._transport.abort()

    def on_headers_complete(self) -> None:
        """Give the status; a reply that only announces another has none."""
        status = self._parser.get_status_code()
        if self._reply is not None and status >= 200:
            self._reply.status_received(status)

    def on_body(self, body: bytes) -> None:
        """Give a piece of the body."""
        if self._reply is not None:
            self._reply.body_received(body)

    def on_message_complete(self) -> None:
        """End the reply; keep the connection where the server does."""
        if self._parser.get_status_code() < 200 or (reply := self._detach()) is None:
            return
        reply.ended()
        if not self._parser.should_keep_alive():
            self._transport.abort()
            return
        if self._paused:
            self.resume_reading()
        self.idle_since = time.monotonic()
        self._on_free(self)
