"""Clients: they read fast, slowly or not to the end, and keep what came, to be checked afterwards."""

import asyncio
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from ares.bench import sse
from ares_dev.chaos.plan import Plan, RequestPlan

# What the kernel buffers for a slow client.
_SMALL_BUFFER = 4096

Outcome = Literal["completed", "left", "failed", "broken", "hung"]


@dataclass(slots=True)
class RequestResult:
    """What became of one request.

    Attributes
    ----------
    outcome
        `completed`; `left`: its client went away; `failed`: with an error, `error`; `broken`: the connection ended
        without an error; `hung`: nothing came any more.
    status
        Of HTTP; 0 where there was no reply.
    tokens, counted
        The tokens, and how many of them the usage counts.
    """

    plan: RequestPlan
    outcome: Outcome
    status: int = 0
    tokens: list[int] = field(default_factory=list)
    counted: int | None = None
    error: str | None = None


class _ClientReply(sse.RawReply):
    """A reply as its client reads it: at once, with pauses, or until the client leaves."""

    def __init__(self, plan: RequestPlan) -> None:
        super().__init__()
        self.left = False
        self._plan = plan
        self._events = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self._plan.client == "leaves" and not self._plan.events:
            self._timer = asyncio.get_running_loop().call_later(self._plan.seconds, self.leave)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        match self._plan.client:
            case "leaves":
                self._events += data.count(sse.EVENT)
                if self._plan.events and self._events >= self._plan.events:
                    self.leave()
            case "slow":
                self.transport.pause_reading()
                self._timer = asyncio.get_running_loop().call_later(self._plan.seconds, self.transport.resume_reading)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def leave(self) -> None:
        self.left = True
        self.transport.abort()


async def send(plan: Plan, request: RequestPlan, port: int, model: str, silence_s: float) -> RequestResult:
    """Send a request to the gateway, and read its reply as its client does.

    Parameters
    ----------
    silence_s
        A reply that brings nothing for longer has hung.
    """
    connection = socket.socket()
    connection.setblocking(False)
    if request.client == "slow":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(connection, ("127.0.0.1", port))
        transport, reply = await loop.create_connection(lambda: _ClientReply(request), sock=connection)
    except OSError as failure:
        connection.close()
        return RequestResult(request, "broken", error=repr(failure))
    reply.send(sse.request_bytes("/v1/completions", _body(plan, request, model), request.name))
    try:
        while not reply.finished.done():
            silent = time.perf_counter() - reply.last_heard
            if silent > silence_s:
                return _result(reply, request, hung=True)
            await asyncio.wait((reply.finished,), timeout=silence_s - silent + 0.1)
    finally:
        transport.abort()
    return _result(reply, request)


def _body(plan: Plan, request: RequestPlan, model: str) -> dict[str, Any]:
    streamed = request.client != "whole"
    return {
        "model": model,
        "prompt": plan.token_ids(request.prompt),
        "max_tokens": request.tokens,
        "ignore_eos": request.ignore_eos,
        "temperature": 0,
        "return_token_ids": True,
        "stream": streamed,
        **({"stream_options": {"include_usage": True}} if streamed else {}),
        **request.parameters,
    }


def _result(reply: _ClientReply, request: RequestPlan, *, hung: bool = False) -> RequestResult:
    """Read what came, and say how the request ended."""
    result = RequestResult(request, "hung", reply.status)
    for chunk in _chunks(reply, request):
        result.tokens += chunk.tokens
        if chunk.error is not None:
            result.error = str(chunk.error.get("message"))
        if chunk.usage is not None:
            result.counted = chunk.usage.completion_tokens
    if hung:
        return result
    if reply.left:
        result.outcome = "left"
    elif result.error is not None:
        result.outcome = "failed"
    else:
        ended = request.client == "whole" or reply.complete
        result.outcome = "completed" if ended and result.counted is not None else "broken"
    return result


def _chunks(reply: _ClientReply, request: RequestPlan) -> list[sse.Chunk]:
    if request.client != "whole" and reply.status == 200:
        return list(reply.chunks())
    try:
        return [sse.decode(reply.body())]
    except msgspec.DecodeError:
        return []  # its client left in the middle of it
