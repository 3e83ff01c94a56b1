"""Clients: they ask, read fast or slowly or not to the end, and keep what came to be judged afterwards."""

import asyncio
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import msgspec

from ares_dev.chaos.plan import Ask, Plan

_EVENT = b"data: {"
# The last event, whatever shares its chunk, and the last chunk.
_ENDING = b"data: [DONE]\n\n\r\n0\r\n\r\n"
# What the kernel takes for a slow client.
_SMALL_BUFFER = 4096

Ending = Literal["completed", "left", "failed", "broken", "hung"]


@dataclass(slots=True)
class Seen:
    """What became of one request.

    Attributes
    ----------
    ending
        `completed`; `left`: its client went away; `failed`: with an error, `error`; `broken`: without a word;
        `hung`: nothing came any more.
    status
        Of HTTP; 0 where there was no reply.
    tokens, counted
        The tokens, and how many of them the usage counts.
    """

    ask: Ask
    ending: Ending
    status: int = 0
    tokens: list[int] = field(default_factory=list)
    counted: int | None = None
    error: str | None = None


class _Reader(asyncio.Protocol):
    """Keeps what one reply brings, for next to no CPU."""

    def __init__(self, ask: Ask) -> None:
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.data: list[bytes] = []
        self.heard = time.monotonic()
        self.left = False
        self._ask = ask
        self._events = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self._ask.client == "leaves" and not self._ask.events:
            self._timer = asyncio.get_running_loop().call_later(self._ask.seconds, self.leave)

    def data_received(self, data: bytes) -> None:
        self.data.append(data)
        self.heard = time.monotonic()
        match self._ask.client:
            case "leaves":
                self._events += data.count(_EVENT)
                if self._ask.events and self._events >= self._ask.events:
                    self.leave()
            case "slow":
                self.transport.pause_reading()
                self._timer = asyncio.get_running_loop().call_later(self._ask.seconds, self.transport.resume_reading)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self.finished.done():
            self.finished.set_result(None)

    def leave(self) -> None:
        self.left = True
        self.transport.abort()


async def ask(plan: Plan, one: Ask, port: int, model: str, patience_s: float) -> Seen:
    """Send a request to the gateway, and read its reply as its client does.

    Parameters
    ----------
    patience_s
        A reply that is silent for longer has hung.
    """
    loop = asyncio.get_running_loop()
    connection = socket.socket()
    connection.setblocking(False)
    if one.client == "slow":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
    try:
        await loop.sock_connect(connection, ("127.0.0.1", port))
        transport, reader = await loop.create_connection(lambda: _Reader(one), sock=connection)
    except OSError as failure:
        connection.close()
        return Seen(one, "broken", error=repr(failure))
    transport.write(_request(plan, one, model))
    try:
        while not reader.finished.done():
            silent = time.monotonic() - reader.heard
            if silent > patience_s:
                return Seen(one, "hung", *_read(b"".join(reader.data), one))
            await asyncio.wait((reader.finished,), timeout=patience_s - silent + 0.1)
    finally:
        transport.abort()
    reply = b"".join(reader.data)
    status, tokens, counted, error = _read(reply, one)
    if reader.left:
        return Seen(one, "left", status, tokens, counted, error)
    if error is not None:
        return Seen(one, "failed", status, tokens, counted, error)
    whole = counted is not None and (one.client == "whole" or reply.endswith(_ENDING))
    return Seen(one, "completed" if whole else "broken", status, tokens, counted)


def _request(plan: Plan, one: Ask, model: str) -> bytes:
    streamed = one.client != "whole"
    body: dict[str, Any] = {
        "model": model,
        "prompt": plan.token_ids(one.prompt),
        "max_tokens": one.tokens,
        "ignore_eos": one.ignore_eos,
        "temperature": 0,
        "return_token_ids": True,
        "stream": streamed,
        **({"stream_options": {"include_usage": True}} if streamed else {}),
        **one.parameters,
    }
    data = msgspec.json.encode(body)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"X-Request-Id: {one.name}\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def _read(reply: bytes, one: Ask) -> tuple[int, list[int], int | None, str | None]:
    """Return status, tokens, how many of them the usage counts, and the error, as far as they came."""
    head, _, body = reply.partition(b"\r\n\r\n")
    status = int(head[9:12]) if head[9:12].isdigit() else 0
    tokens: list[int] = []
    counted: int | None = None
    error: str | None = None
    streamed = one.client != "whole" and status == 200
    for line in body.split(b"\n") if streamed else [b"data: " + body]:
        if not line.startswith(_EVENT):
            continue
        try:
            event = msgspec.json.decode(line[6:])
        except msgspec.DecodeError:
            break  # its client left in the middle of it
        if "error" in event:
            error = str(event["error"].get("message"))
        for choice in event.get("choices", ()):
            tokens += choice.get("token_ids") or []
        if event.get("usage"):
            counted = event["usage"]["completion_tokens"]
    return status, tokens, counted, error
