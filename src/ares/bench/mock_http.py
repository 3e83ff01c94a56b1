"""HTTP for the mock engine: just what a gateway sends, and streams that cost next to nothing to write."""

import asyncio
from typing import Any, Protocol, cast

import httptools
import msgspec

# Rounds of a stream's events that one write holds where the reader alone sets the pace.
_ROUNDS = 4


def chunk(data: bytes) -> bytes:
    """Return an HTTP chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(body: Any) -> bytes:
    """Return a server-sent event in an HTTP chunk of its own, as uvicorn writes what vLLM yields."""
    return chunk(b"data: " + msgspec.json.encode(body) + b"\n\n")


END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


class Stream:
    """A streamed reply: `head` once, `events` over and over until `count` of them are written, then `tail`.

    Attributes
    ----------
    key, prompt
        Name and prompt length of the request.
    written
        Events written so far.
    paused
        Whether its reader is behind.
    """

    def __init__(self, key: str, prompt: int, head: bytes, events: list[bytes], count: int, tail: bytes) -> None:
        self.key = key
        self.prompt = prompt
        self.written = 0
        self.paused = False
        self._head = head
        self._events = events
        self._batch = b"".join(events) * _ROUNDS
        self._batch_events = len(events) * _ROUNDS
        self._count = count
        self._tail = tail

    def take(self, limit: int) -> tuple[bytes, bool]:
        """Return the bytes of up to so many events, and whether they are the last."""
        n = min(limit, self._count - self.written, self._batch_events)
        size = len(self._events)
        if n == self._batch_events:
            data = self._batch
        else:
            data = b"".join(self._events[(self.written + i) % size] for i in range(n))
        if not self.written:
            data = self._head + data
        self.written += n
        last = self.written == self._count
        return (data + self._tail if last else data), last


class Service(Protocol):
    """What answers the requests of a connection."""

    def answer(self, path: bytes, body: dict[str, Any], connection: "Connection") -> None:
        """Answer a request, by `reply` or `begin`."""
        ...

    def start(self, stream: Stream, connection: "Connection") -> None:
        """Begin to write a stream."""
        ...

    def resume(self, stream: Stream) -> None:
        """Go on: its reader has caught up."""
        ...

    def stop(self, stream: Stream) -> None:
        """Forget a stream whose reader has gone."""
        ...


class Connection(asyncio.Protocol):
    """One HTTP connection; the callbacks of httptools are its public face."""

    transport: asyncio.Transport

    def __init__(self, service: Service) -> None:
        self.stream: Stream | None = None
        self._service = service
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102 - asyncio's interface
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:  # noqa: D102 - asyncio's interface
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102 - asyncio's interface
        if self.stream is not None:
            self._service.stop(self.stream)

    def pause_writing(self) -> None:  # noqa: D102 - asyncio's interface
        if self.stream is not None:
            self.stream.paused = True

    def resume_writing(self) -> None:  # noqa: D102 - asyncio's interface
        if self.stream is not None:
            self.stream.paused = False
            self._service.resume(self.stream)

    def on_url(self, url: bytes) -> None:  # noqa: D102 - httptools' interface
        self._path, self._body = url, b""

    def on_body(self, body: bytes) -> None:  # noqa: D102 - httptools' interface
        self._body += body

    def on_message_complete(self) -> None:  # noqa: D102 - httptools' interface
        self._service.answer(self._path.partition(b"?")[0], msgspec.json.decode(self._body or b"{}"), self)

    def reply(self, body: Any, status: bytes = b"200 OK") -> None:
        """Answer with a JSON body."""
        data = msgspec.json.encode(body)
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(data))
        self.transport.write(head + data)

    def begin(self, stream: Stream) -> None:
        """Answer with a stream."""
        self.stream = stream
        self._service.start(stream, self)
