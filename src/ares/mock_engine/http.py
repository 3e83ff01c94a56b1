"""HTTP/1.1 server of the mock engines: the requests of a gateway and of `curl`, and streams that are cheap to write."""

import asyncio
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Protocol, TypeVar, cast

import httptools
import msgspec

_MAX_HEAD_BYTES = 1 << 16
_MAX_BODY_BYTES = 32 << 20
_MAX_PIPELINED = 16
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_LAST_CHUNK = b"0\r\n\r\n"
# What msgspec raises of a body: it is not JSON or of other types, not UTF-8, or nested without end.
MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
logger = logging.getLogger(__name__)


class HttpError(Exception):
    """A request that is refused; the reply has vLLM's form."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


def chunk(data: bytes) -> bytes:
    """Return an HTTP chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def server_sent_event(body: Any) -> bytes:
    """Return a server-sent event in its own HTTP chunk, as uvicorn writes what vLLM yields."""
    return chunk(b"data: " + msgspec.json.encode(body) + b"\n\n")


class HttpRequest(msgspec.Struct):
    """A request as it was received; `authorization` and `traceparent` are the values of those headers."""

    method: bytes
    path: bytes
    body: bytes
    keep_alive: bool
    authorization: bytes = b""
    traceparent: bytes = b""


_Handler = TypeVar("_Handler")
_Body = TypeVar("_Body")


def handler(routes: Mapping[tuple[bytes, bytes], _Handler], request: HttpRequest) -> _Handler:
    """Return the handler of a request's method and path; HttpError 404 where there is none."""
    found = routes.get((request.method, request.path))
    if found is None:
        method, path = request.method.decode(), request.path.decode(errors="replace")
        raise HttpError(404, f"a mock engine has no route {method} {path}")
    return found


def decode(body: bytes, kind: type[_Body]) -> _Body:
    """Return a JSON body as a type; HttpError 400 where it is not of that type."""
    try:
        return msgspec.json.decode(body, type=kind)
    except MALFORMED as error:
        raise HttpError(400, f"1 validation error: {error}") from error


class Service(Protocol):
    """What answers the requests of a connection."""

    connections: set["Connection"]

    def answer(self, request: HttpRequest, connection: "Connection") -> None:
        """Answer a request, now or later, by `reply` or by `begin` and `end`; HttpError refuses it."""

    def caught_up(self, connection: "Connection") -> None:
        """Continue a stream whose client reads again."""

    def disconnected(self, connection: "Connection") -> None:
        """Abort the request of a client that has disconnected."""


class Connection(asyncio.Protocol):
    """One HTTP connection; its public methods are the callbacks of httptools and asyncio, and what its service calls.

    Attributes
    ----------
    work
        What its service does for the current request.
    paused
        Whether its client reads too slowly, so that nothing more should be written.
    """

    transport: asyncio.Transport

    def __init__(self, service: Service) -> None:
        self.work: Any = None
        self.paused = False
        self._service = service
        self._parser = httptools.HttpRequestParser(self)
        self._reset()
        self._waiting: list[HttpRequest] = []
        self._current: HttpRequest | None = None
        self._broken = False

    @property
    def peer(self) -> str:
        """The client's address."""
        name = self.transport.get_extra_info("peername")
        return str(name[0]) if name else ""

    # --- asyncio calls these ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102 - asyncio's interface
        self.transport = cast(asyncio.Transport, transport)
        self._service.connections.add(self)

    def data_received(self, data: bytes) -> None:  # noqa: D102 - asyncio's interface
        if self._broken:
            return
        self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
            if not self._in_body and self._head_bytes > _MAX_HEAD_BYTES:
                raise HttpError(431, "the head of the request is too large")
        except httptools.HttpParserUpgrade:
            self._refuse(HttpError(400, "this server upgrades no connection"))
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, HttpError) else HttpError(400, f"not an HTTP request: {error}"))
        except HttpError as error:
            self._refuse(error)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102 - asyncio's interface
        self._service.connections.discard(self)
        self._waiting.clear()
        self._broken = True
        if self.work is not None:
            self._service.disconnected(self)

    def pause_writing(self) -> None:  # noqa: D102 - asyncio's interface
        self.paused = True

    def resume_writing(self) -> None:  # noqa: D102 - asyncio's interface
        self.paused = False
        if self.work is not None:
            self._service.caught_up(self)

    # --- httptools calls these ---

    def on_url(self, url: bytes) -> None:  # noqa: D102 - httptools' interface
        self._url += url
        if len(self._url) > _MAX_HEAD_BYTES:
            raise HttpError(414, "the address is too long")

    def on_header(self, name: bytes, value: bytes) -> None:  # noqa: D102 - httptools' interface
        match name.lower():
            case b"authorization":
                self._authorization = value
            case b"traceparent":
                self._traceparent = value

    def on_headers_complete(self) -> None:  # noqa: D102 - httptools' interface
        self._in_body = True

    def on_body(self, body: bytes) -> None:  # noqa: D102 - httptools' interface
        self._size += len(body)
        if self._size > _MAX_BODY_BYTES:
            raise HttpError(413, f"the body is larger than {_MAX_BODY_BYTES} bytes")
        self._body.append(body)

    def on_message_complete(self) -> None:  # noqa: D102 - httptools' interface
        if self._broken:
            return
        path = self._url.partition(b"?")[0]
        request = HttpRequest(
            self._parser.get_method(),
            path,
            b"".join(self._body),
            bool(self._parser.should_keep_alive()),
            self._authorization,
            self._traceparent,
        )
        self._reset()
        if self._current is None:
            self._answer(request)
        elif len(self._waiting) < _MAX_PIPELINED:
            self._waiting.append(request)
        else:
            self.transport.abort()

    # --- the service calls these ---

    def reply(self, body: Any, status: int = 200) -> None:
        """Answer with JSON, or with text as it is."""
        plain = isinstance(body, str)
        data = body.encode() if plain else msgspec.json.encode(body)
        kind = b"text/plain; version=0.0.4; charset=utf-8" if plain else b"application/json"
        phrase = HTTPStatus(status).phrase.encode()
        head = b"HTTP/1.1 %d %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n" % (status, phrase, kind, len(data))
        keep = self._current is not None and self._current.keep_alive
        self.transport.write(head + (b"\r\n" if keep else b"connection: close\r\n\r\n") + data)
        self._next()

    def refuse(self, error: HttpError) -> None:
        """Answer with an error in vLLM's form."""
        kind = "BadRequestError" if error.status == 400 else HTTPStatus(error.status).phrase
        body = {"message": str(error), "type": kind, "param": error.param, "code": error.status}
        self.reply({"error": body}, error.status)

    def begin(self) -> None:
        """Begin a stream of events."""
        self.transport.write(_STREAM_HEAD)

    def end(self, data: bytes) -> None:
        """End a stream with its last chunks."""
        self.transport.write(data + _LAST_CHUNK)
        self._next()

    def _answer(self, request: HttpRequest) -> None:
        self._current = request
        try:
            self._service.answer(request, self)
        except HttpError as error:
            self.refuse(error)
        except Exception:  # the step that ended the request before this one must continue
            logger.exception("a request failed")
            self.refuse(HttpError(500, "the mock engine failed; its log says why"))

    def _next(self) -> None:
        """Continue with the next request of the connection."""
        self.work = None
        keep = self._current is not None and self._current.keep_alive
        self._current = None
        if not keep:
            self._broken = True
            self.transport.close()
        elif self._waiting:
            self._answer(self._waiting.pop(0))

    def _refuse(self, error: HttpError) -> None:
        """Answer bytes that are no valid request, and close the connection."""
        self._broken = True
        if self._current is None:
            self.refuse(error)
        else:
            self.transport.abort()

    def _reset(self) -> None:
        self._url = self._authorization = self._traceparent = b""
        self._body: list[bytes] = []
        self._size = self._head_bytes = 0
        self._in_body = False
