"""A client's connection: uvicorn's, with limits on the head, on idling, and on slow readers."""

import asyncio
import fcntl
import struct
import termios
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import httptools
import msgspec
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ares.gateway.http.refusals import NO_ROUTE, Count
from ares.gateway.http.responses import error_body, offer_write_at_once
from ares.gateway.http.round_of_writes import RoundOfWrites


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may take.

    Attributes
    ----------
    head_bytes
        Of the request line and all headers, those behind a chunked body included.
    idle_s
        For a whole head, and between two parts of a body.
    unread_s
        For a slow reader to catch up.
    """

    head_bytes: int
    idle_s: float
    unread_s: float


class HeadTooLargeError(Exception):
    """The head of a request exceeds the limit."""


class TooManyWaitingError(Exception):
    """Too many requests on one connection wait for those before them."""


# Requests of one connection that are not answered yet. No known client sends one before it has the reply to the last.
_MOST_UNANSWERED = 64


class _Parser(httptools.HttpRequestParser):
    """httptools' parser, to which `Upgrade` is a header like any other: no other protocol is spoken here.

    A server may ignore the header (RFC 9110, 7.8), and every HTTP client of Java sends one. httptools takes the request
    to end with its head and hands the rest back: here the head is read once more without the header, and then the rest.
    """

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection
        self._begin()

    def wants_upgrade(self) -> bool:
        """Whether the request that was just read asks for another protocol (CONNECT asks for a tunnel)."""
        return self.should_upgrade() and self.get_method() != b"CONNECT"

    def feed_data(self, data: Any) -> None:
        """Parse what came."""
        while True:
            try:
                return super().feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if not self.wants_upgrade():
                    raise
                data = self._connection.head_without_upgrade() + data[upgrade.args[0] :]
                self._begin()
            except httptools.HttpParserError as failure:
                self._connection.malformed = str(failure)
                raise

    def _begin(self) -> None:
        """Start at the beginning of a request, even after one that was to be the last of its connection."""
        super().__init__(self._connection)
        # As uvicorn sets it for its own.
        self.set_dangerous_leniencies(lenient_data_after_close=True)


class Connection(HttpToolsProtocol):
    """Costs nothing while a stream runs: a timer is set only when the reader falls behind.

    uvicorn pauses a stream when its reader is 64 KiB behind, and the stream pauses its engine: a reader's buffer is
    bounded, and other streams are not affected. A reader that stays behind is disconnected, and the engine aborts.
    """

    parser: _Parser
    malformed: str
    """What is wrong with the request, as the parser says it."""
    sends_no_more: bool
    """Whether the client has closed its side, and waits for the answers to what it has sent."""

    def __init__(
        self,
        limits: Limits,
        count: Count = lambda *_: None,
        on_lost: Callable[[], None] = lambda: None,
        writes: RoundOfWrites | None = None,
        **uvicorn: Any,
    ) -> None:
        super().__init__(**uvicorn)
        self._writes = RoundOfWrites() if writes is None else writes
        self.parser = _Parser(self)
        self._limits = limits
        self._count_refusal = count
        self._on_lost = on_lost
        self._head_bytes = self._unparsed_bytes = 0
        self._in_body = False
        self._cycles: deque[RequestResponseCycle] = deque()
        self._refusal: bytes | None = None
        self.malformed = ""
        self.sends_no_more = False
        # When part of a request came last, and the timer that looks at it.
        self._active_at = 0.0
        self._idle: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    # --- asyncio calls these ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # noqa: D102 - asyncio's
        super().connection_made(transport)
        self._restart_idle_timer()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether to keep the other direction open, for the answers to requests that came whole before.

        A client that has left looks the same as one that only sends no more: what waits for a client to leave, such as
        a generation, is cancelled in both cases. TLS cannot be closed on one side.
        """
        unanswered = self._unanswered()
        if self.scheme == "https" or self._in_body or not unanswered:
            return False
        self.sends_no_more = True
        self.cycle.keep_alive = False
        for cycle in unanswered:
            cycle.message_event.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102 - asyncio's interface
        for timer in (self._idle, self._unread):
            if timer is not None:
                timer.cancel()
        # uvicorn sees to the newest request alone, and one that others wait behind is an older one.
        for cycle in self._unanswered():
            _end(cycle)
        super().connection_lost(exc)
        self._on_lost()

    def data_received(self, data: bytes) -> None:  # noqa: D102 - asyncio's interface
        if self._refusal is not None:
            return  # nothing can be read behind what is no request
        if self._idle is None:
            self._restart_idle_timer()
        self._unparsed_bytes += len(data)
        super().data_received(data)
        # The parser reports a header, or a field behind a chunked body, only when it is complete. Until then it keeps
        # what has come, and copies all of it with each read.
        unparsed = self._unparsed_bytes
        if unparsed > self._limits.head_bytes and self._refusal is None and not self.transport.is_closing():
            self._head_bytes = unparsed
            self.send_400_response("")

    def pause_writing(self) -> None:  # noqa: D102 - asyncio's interface
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:  # noqa: D102 - asyncio's interface
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _watch_reader(self) -> None:
        """Disconnect the client in a while, unless it has read something by then."""
        self._unread = self.loop.call_later(self._limits.unread_s, self._check_reader, self._unread_bytes())

    def _check_reader(self, before: int) -> None:
        if self._unread_bytes() < before:
            self._watch_reader()
        else:
            self.transport.abort()

    def _unread_bytes(self) -> int:
        """Return how much waits here and in the kernel: a large buffer there empties for long before it takes more."""
        descriptor = self.transport.get_extra_info("socket").fileno()
        in_kernel: int = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))[0]
        return self.transport.get_write_buffer_size() + in_kernel

    # --- httptools calls these ---

    def on_message_begin(self) -> None:  # noqa: D102 - httptools' interface
        if len(self._unanswered()) >= _MOST_UNANSWERED:
            raise TooManyWaitingError
        if self._idle is None:  # behind another request, in one read
            self._restart_idle_timer()
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:  # noqa: D102 - httptools' interface
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:  # noqa: D102 - httptools' interface
        self._count(len(name) + len(value))
        if not self._in_body:  # fields behind a chunked body are no headers (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:  # noqa: D102 - httptools' interface
        if self.parser.wants_upgrade():
            return  # the same head comes again
        self._unparsed_bytes = 0
        super().on_headers_complete()
        self._unanswered().append(self.cycle)
        self._in_body = True
        self.cycle.receive = _Receive(self, self.cycle)  # type: ignore[method-assign]
        if self.scope["http_version"] < "1.1":
            self.cycle.send = _Unchunked(self.cycle)  # type: ignore[method-assign]
        offer_write_at_once(cast(Scope, self.scope), _WriteAtOnce(self.cycle, self._writes))

    def on_body(self, body: bytes) -> None:  # noqa: D102 - httptools' interface
        self._restart_idle_timer()
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:  # noqa: D102 - httptools' interface
        if self.parser.wants_upgrade():
            return
        self._in_body = False
        self._unparsed_bytes = 0
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on after a reply (uvicorn's cycles call this)."""
        super().on_response_complete()
        if self._refusal is not None and not self._unanswered() and not self.transport.is_closing():
            self._refuse(self._refusal)

    def send_400_response(self, msg: str) -> None:
        """Answer a malformed request, or one with too large a head, in OpenAI's form, and close the connection.

        The replies to requests before it come first. Where its own has begun, because only its body is malformed, the
        connection is closed without another one.
        """
        own = self._cycles.pop() if self._in_body else None
        if own is not None:
            begun = own.response_started
            _end(own)
            if begun:
                self.close()
                return
            self._in_body = False
            self.pipeline = deque(waiting for waiting in self.pipeline if waiting[0] is not own)
        self._refusal = self._refusal_reply()
        if not self._unanswered():
            self._refuse(self._refusal)
            return
        # To close with something unread would be a reset, with which the client may lose the replies.
        self.flow.resume_reading()
        if self._idle is not None:
            self._idle.cancel()

    def close(self) -> None:
        """Close it when all that was written has been sent."""
        self._writes.flush(self.transport)
        self.transport.close()

    def _refusal_reply(self) -> bytes:
        large = self._head_bytes > self._limits.head_bytes
        if large:
            text = f"the head of the request is larger than {self._limits.head_bytes} bytes"
        elif len(self._unanswered()) >= _MOST_UNANSWERED:
            text = f"{_MOST_UNANSWERED} requests of this connection wait for their answers already"
        else:
            text = f"not a request of HTTP/1.1: {self.malformed}"
        status, phrase = (431, "Request Header Fields Too Large") if large else (400, "Bad Request")
        self._count_refusal(NO_ROUTE, status, None if large else "malformed_http")
        body = msgspec.json.encode(error_body(status, text))
        head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        return head.encode() + b"connection: close\r\n\r\n" + body

    def _refuse(self, reply: bytes) -> None:
        self.transport.write(reply)
        self.transport.close()

    def _unanswered(self) -> deque[RequestResponseCycle]:
        """Return the requests that have come and are not answered yet, the first one first."""
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft()
        return self._cycles

    def head_without_upgrade(self) -> bytes:
        """Return the head that was read last, without the header that asks for another protocol."""
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._limits.head_bytes:
            raise HeadTooLargeError

    def _restart_idle_timer(self) -> None:
        """Wait for the next part of a request, for `idle_s` at most."""
        self._active_at = self.loop.time()
        if self._idle is None:
            self._idle = self.loop.call_later(self._limits.idle_s, self._check_idle)

    def _check_idle(self) -> None:
        self._idle = None
        left_s = self._active_at + self._limits.idle_s - self.loop.time()
        if self.flow.read_paused:  # the gateway does not read: requests before this one are answered first
            self._restart_idle_timer()
        elif left_s > 0:
            self._idle = self.loop.call_later(left_s, self._check_idle)
        else:
            self.transport.abort()


def _end(cycle: RequestResponseCycle) -> None:
    """Let a request end as where its client has left."""
    cycle.disconnected = True
    cycle.message_event.set()


class _Unchunked:
    """Sends replies to a client of HTTP/1.0: without chunks, the end of the connection is the end of the reply.

    uvicorn chunks a reply of undeclared length unless `chunked_encoding` is set before, and then holds every part of
    the reply against the declared length.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._send = cycle.send
        self._undeclared = False

    async def __call__(self, message: Any) -> None:
        """Send part of a reply (the ASGI interface)."""
        if message["type"] == "http.response.start":
            self._undeclared = all(name.lower() != b"content-length" for name, _ in message.get("headers", []))
            if self._undeclared:
                self._cycle.chunked_encoding = self._cycle.keep_alive = False
        elif self._undeclared:
            self._cycle.expected_content_length = len(message.get("body", b""))
        await self._send(message)


class _WriteAtOnce:
    """Writes parts of a chunked reply without a coroutine, as uvicorn's `send` does where it need not wait."""

    __slots__ = ("_cycle", "_flow", "_transport", "_writes")

    def __init__(self, cycle: RequestResponseCycle, writes: RoundOfWrites) -> None:
        self._cycle, self._flow, self._transport = cycle, cycle.flow, cycle.transport
        self._writes = writes

    @property
    def possible(self) -> bool:
        """Whether the client keeps up, and the reply is a stream of chunks."""
        cycle = self._cycle
        return not (self._flow.write_paused or not cycle.chunked_encoding or cycle.response_complete)

    def __call__(self, body: bytes) -> None:
        """Write a part in this round of the event loop."""
        self._writes.add(self._transport, b"%x\r\n%b\r\n" % (len(body), body))

    def flush(self) -> None:
        """Write now what waits for the end of the round."""
        self._writes.flush(self._transport)


class _Receive:
    """Receives a request; once its client sends no more, what comes after the body is that the client has left."""

    def __init__(self, connection: Connection, cycle: RequestResponseCycle) -> None:
        # Both refer to this object: without weak references all of a request would wait for garbage collection.
        self._connection: Connection = weakref.proxy(connection)
        self._cycle: RequestResponseCycle = weakref.proxy(cycle)
        self._whole = False

    async def __call__(self) -> Any:
        """Receive part of a request (the ASGI interface)."""
        message: Any = {"type": "http.disconnect"} if self._left else await RequestResponseCycle.receive(self._cycle)
        if not self._left:
            self._whole = not message.get("more_body", False)
            return message
        if self._cycle.response_started and not self._cycle.response_complete:
            # A stream, which ends here.
            self._cycle.disconnected = True
            self._connection.close()
        return {"type": "http.disconnect"}

    @property
    def _left(self) -> bool:
        return self._whole and self._connection.sends_no_more
