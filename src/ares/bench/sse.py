"""Reading streamed replies (server-sent events): the one client of all benchmarks.

`open_stream` decodes each event as it arrives. `RawReply` only stores the bytes and their times, which takes little
CPU, so that thousands of streams can be read on the machine of the gateway that is measured; they are decoded later.
"""

import asyncio
import contextlib
import time
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, cast

import aiohttp
import msgspec

from ares.protocol.fields import REQUEST_ID_HEADER

EVENT = b"data: {"
_END_OF_EVENT = b"\n\n"
# The end of an event, of its HTTP chunk, and the last chunk; a head may end in the bytes of the last chunk alone.
_END_OF_STREAM = b"\n\n\r\n0\r\n\r\n"
_DONE = b"data: [DONE]" + _END_OF_STREAM
# Events of a chat that are no tokens: the one with the role, and `[DONE]`.
OTHER_EVENTS = 2


class StreamError(RuntimeError):
    """A stream broke, was refused, or holds an error; the message says which."""


class Message(msgspec.Struct):
    """What an event adds to a chat's message."""

    content: str | None = None


class Choice(msgspec.Struct):
    """One choice of a reply, or what an event adds to it."""

    index: int = 0
    token_ids: list[int] | None = None
    delta: Message | None = None


class Usage(msgspec.Struct):
    """The tokens that a reply counts."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chunk(msgspec.Struct):
    """One event of a stream, or a whole reply."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: dict[str, Any] | None = None

    @property
    def tokens(self) -> list[int]:
        """The tokens of all choices."""
        return [token for choice in self.choices for token in choice.token_ids or []]


decode = msgspec.json.Decoder(Chunk).decode


def session(silence_s: float = 300.0, *, keep_connections: bool = True) -> aiohttp.ClientSession:
    """Make an HTTP client for any number of long streams; one that is silent for `silence_s` seconds fails."""
    timeout = aiohttp.ClientTimeout(total=None, sock_read=silence_s)
    connector = aiohttp.TCPConnector(limit=0, force_close=not keep_connections)
    return aiohttp.ClientSession(timeout=timeout, connector=connector)


@contextlib.asynccontextmanager
async def open_stream(
    http: aiohttp.ClientSession, url: str, body: dict[str, Any], request_id: str | None = None
) -> AsyncIterator[AsyncIterator[Chunk]]:
    """Send a request for a stream and yield its events as they arrive; leaving the context early closes the connection.

    Parameters
    ----------
    url
        The whole URL of the route.
    body
        The request, with `stream`.
    request_id
        Sent as `x-request-id`.

    Raises
    ------
    StreamError
        The reply has another status than 200, or an event is an error.
    """
    headers = {REQUEST_ID_HEADER: request_id} if request_id is not None else None
    async with http.post(url, json=body, headers=headers) as reply:
        if reply.status != 200:
            raise StreamError(f"{reply.status}: {(await reply.text())[:200]}")
        yield _chunks(reply)


async def _chunks(reply: aiohttp.ClientResponse) -> AsyncIterator[Chunk]:
    async for line in reply.content:
        if line.startswith(EVENT):
            chunk = decode(line[6:])
            if chunk.error is not None:
                raise StreamError(str(chunk.error.get("message")))
            yield chunk


def request_bytes(path: str, body: dict[str, Any], request_id: str | None = None) -> bytes:
    """Return a POST request as it is written to a connection, which the server closes after its reply."""
    data = msgspec.json.encode(body)
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", "Connection: close"]
    if request_id is not None:
        lines.append(f"X-Request-Id: {request_id}")
    return "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data


class RawReply(asyncio.Protocol):
    """A connection that keeps what one reply brings and when.

    Attributes
    ----------
    finished
        Done when the connection is closed; its result is why, if it broke.
    data, times
        What each read brought, and when (`time.perf_counter`).
    started
        When the request was sent.
    """

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.finished: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.data: list[bytes] = []
        self.times = array("d")
        self.started = time.perf_counter()
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes) -> None:
        """Send the request."""
        self.started = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Store the data; close where a stream has ended and its server keeps the connection."""
        self.data.append(data)
        self.times.append(time.perf_counter())
        self._tail = (self._tail + data[-len(_END_OF_STREAM) :])[-len(_END_OF_STREAM) :]
        if self._tail == _END_OF_STREAM:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Finish the reply."""
        if not self.finished.done():
            self.finished.set_result(exc)

    @property
    def last_heard(self) -> float:
        """When data last arrived, or the request was sent."""
        return self.times[-1] if self.times else self.started

    @property
    def status(self) -> int:
        """HTTP status; 0 before it has arrived."""
        code = b"".join(self.data[:12])[9:12]
        return int(code) if code.isdigit() else 0

    @property
    def complete(self) -> bool:
        """Whether the stream is complete."""
        return b"".join(self.data[-len(_DONE) :]).endswith(_DONE)

    def body(self) -> bytes:
        """Return what came after the headers, with the framing of HTTP chunks."""
        return b"".join(self.data).partition(b"\r\n\r\n")[2]

    def chunks(self) -> Iterator[Chunk]:
        """Decode the events of a stream, up to one that was cut off."""
        return read_chunks(self.body())

    def text(self) -> str:
        """Return the text of a complete streamed chat, also where HTTP chunks begin and end within events."""
        body, parts, at = self.body(), [], 0
        while True:
            end = body.index(b"\r\n", at)
            size = int(body[at:end], 16)
            if not size:
                break
            at = end + 2 + size + 2
            parts.append(body[end + 2 : at - 2])
        deltas = (choice.delta for chunk in read_chunks(b"".join(parts)) for choice in chunk.choices)
        return "".join([delta.content or "" for delta in deltas if delta is not None])

    def events_of_reads(self) -> Iterator[tuple[float, int]]:
        """Yield when each read came, and how many events ended in it, `[DONE]` included."""
        tail = b""
        for moment, data in zip(self.times, self.data, strict=True):
            yield moment, (tail + data).count(_END_OF_EVENT)
            tail = data[-1:]


def read_chunks(body: bytes) -> Iterator[Chunk]:
    """Decode the events of a stream's body, up to one that was cut off."""
    for line in body.split(b"\n"):
        if line.startswith(EVENT):
            try:
                yield decode(line[6:])
            except msgspec.DecodeError:
                return


def check_chat(reply: RawReply, tokens: int, *, role_event: bool = True) -> None:
    """Check that every token of a streamed chat has come.

    Parameters
    ----------
    role_event
        Whether the role has an event of its own, as from vLLM, before that of the first token.

    Raises
    ------
    StreamError
        The stream broke, or its events are not one a token, that of the role and `[DONE]`.
    """
    if not reply.complete:
        begin = b"".join(reply.data)[:500]
        raise StreamError(f"the stream broke ({reply.finished.result()!r}); it began with {begin!r}")
    events = sum(count for _, count in reply.events_of_reads())
    expected = tokens + OTHER_EVENTS - (not role_event)
    if events != expected:
        raise StreamError(f"{events} events arrived instead of {expected}")


def check_same_text(replies: Sequence[RawReply]) -> None:
    """Check that the streams of chats that get the same tokens have the same text; StreamError where one has another.

    Mock engines that compute nothing give all chats the same tokens.
    """
    if len({reply.text() for reply in replies}) > 1:
        raise StreamError("the streams have different texts, although all get the same tokens")


def first_token_s(reply: RawReply, tokens: int, *, role_event: bool = True) -> float:
    """Return the seconds from a chat's request to the read with its first token; see `check_chat`."""
    check_chat(reply, tokens, role_event=role_event)
    events = 0
    for moment, count in reply.events_of_reads():
        events += count
        if events > role_event:
            return moment - reply.started
    raise StreamError("the stream has no token")


async def read_at_once(requests: Sequence[bytes], ports: Sequence[int], limit_s: float) -> list[RawReply]:
    """Send all requests at the same moment, to the ports of this machine in turns, and read every reply to its end.

    All are connected before the first is sent, so that connecting is in no timing.

    Raises
    ------
    StreamError
        A server takes no connection, or a reply took longer than `limit_s` seconds.
    """
    loop = asyncio.get_running_loop()
    replies: list[RawReply] = []
    try:
        for number in range(len(requests)):
            _, reply = await loop.create_connection(RawReply, "127.0.0.1", ports[number % len(ports)])
            replies.append(reply)
    except OSError as error:
        raise StreamError(f"no connection: {error}") from error
    for reply, request in zip(replies, requests, strict=True):
        reply.send(request)
    try:
        async with asyncio.timeout(limit_s):
            await asyncio.gather(*(reply.finished for reply in replies))
    except TimeoutError:
        late = sum(not reply.complete for reply in replies)
        raise StreamError(f"{late} of {len(replies)} replies took longer than {limit_s:g} s") from None
    return replies
