"""A client that reads streams for next to no CPU: it counts events and does not parse them."""

import asyncio
import time
from dataclasses import dataclass
from typing import cast

import msgspec

_END_OF_EVENT = b"\n\n"
_END_OF_STREAM = b"data: [DONE]\n\n\r\n0\r\n\r\n"
# Longest silence of a stream before it counts as broken.
_SILENCE_S = 60.0


class StreamError(RuntimeError):
    """A stream broke, or was not what was asked for."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one stream brought: `first_token_s` counts from the request to the first event that carries a token."""

    events: int
    reads: int
    first_token_s: float


class _Reader(asyncio.Protocol):
    def __init__(self, request: bytes, go: "asyncio.Future[None]") -> None:
        self.finished: asyncio.Future[Reading] = go.get_loop().create_future()
        self._request = request
        self._go = go
        self._started = 0.0
        self._first_token_s = 0.0
        self._events = 0
        self._reads = 0
        self._head = b""
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._go.add_done_callback(self._send)

    def _send(self, _: "asyncio.Future[None]") -> None:
        self._started = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        # An event may end across two reads; the HTTP framing between events holds no empty line of this kind.
        self._events += data.count(_END_OF_EVENT) + (self._tail[-1:] == b"\n" and data[:1] == b"\n")
        self._reads += 1
        if not self._first_token_s and self._events > 1:  # the first event says who speaks
            self._first_token_s = time.perf_counter() - self._started
        if len(self._head) < 500:
            self._head += data[:500]
        self._tail = data[-64:] if len(data) >= 64 else (self._tail + data)[-64:]
        if self._tail.endswith(_END_OF_STREAM):
            if not self.finished.done():
                self.finished.set_result(Reading(self._events, self._reads, self._first_token_s))
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.finished.done():
            self.finished.set_exception(StreamError(f"the stream broke ({exc!r}); it began with {self._head[:500]!r}"))


async def read_streams(port: int, model: str, streams: int, tokens: int) -> list[Reading]:
    """Read so many chat streams of so many tokens at once, and check that every token arrived.

    Raises
    ------
    StreamError
        A stream broke, or its events are not one a token, one for the role and `[DONE]`.
    """
    loop = asyncio.get_running_loop()
    body = msgspec.json.encode(
        {
            "model": model,
            "messages": [{"role": "user", "content": "What is gravity?"}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    )
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    # All are connected before the first one asks, so that connecting is in no timing.
    go: asyncio.Future[None] = loop.create_future()
    readers = [
        (await loop.create_connection(lambda: _Reader(request, go), "127.0.0.1", port))[1] for _ in range(streams)
    ]
    go.set_result(None)
    async with asyncio.timeout(_SILENCE_S + tokens):
        readings = await asyncio.gather(*(reader.finished for reader in readers))
    for reading in readings:
        if reading.events != tokens + 2:
            raise StreamError(f"{reading.events} events arrived instead of {tokens + 2}")
    return readings
