"""Replies: errors in the form of their route's API, and streams that stop when their client disconnects."""

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ares.gateway.anthropic import errors as anthropic
from ares.protocol.fields import REQUEST_ID_HEADER

_KEEP_ALIVE = b": keep-alive\n\n"  # vLLM's
_SERVER_SEND = "ares.send"
_WRITE_AT_ONCE = "ares.write_at_once"
_CLEANUP = "ares.cleanup"
_CODE = "ares.error_code"
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object."""
    kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    named = _encodable(param) if param is not None else None
    return {"error": {"message": _encodable(message), "type": kind, "param": named, "code": code}}


def _encodable(text: str) -> str:
    """Replace halves of surrogate pairs, which a client's JSON can spell and no reply can hold."""
    return text.encode("utf-8", "replace").decode()


def error(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """Return an error reply, in OpenAI's form or, on the routes of its API, in Anthropic's."""
    body = error_body(status, message, param, code)
    reply = _ErrorReply(body, status, headers)
    reply.code, reply.message = code, body["error"]["message"]
    return reply


def valid_request_id(given: str) -> bool:
    """Whether a client's id of its request is taken over."""
    return _REQUEST_ID.fullmatch(given) is not None


class _ErrorReply(JSONResponse):
    """Chooses its form by the route, stores the code of the error for `error_code`, repeats the client's id."""

    code: str | None = None
    message = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply (the ASGI interface)."""
        scope[_CODE] = self.code
        if anthropic.is_form_of(scope["path"].removeprefix(scope.get("root_path", ""))):
            self.body = self.render(anthropic.error_body(self.status_code, self.message))
            self.headers["content-length"] = str(len(self.body))
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        if valid_request_id(given):
            self.headers[REQUEST_ID_HEADER] = given
        await super().__call__(scope, receive, send)


def error_code(scope: Scope) -> str | None:
    """Return the code of the error that a request was answered with; None where it has none."""
    code: str | None = scope.get(_CODE)
    return code


class DirectSend:
    """Outermost layer of the application: an EventStream writes directly to the server, past the layers between.

    Each of them wraps `send` in a coroutine of its own, and reads nothing but the start of a reply.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on (the ASGI interface)."""
        if scope.get("method") != "HEAD":  # its reply is the start alone
            scope[_SERVER_SEND] = send
        try:
            await self._app(scope, receive, send)
        finally:
            # Both refer to the scope: with them, all of a request would wait for garbage collection.
            scope.pop(_SERVER_SEND, None)
            scope.pop(_WRITE_AT_ONCE, None)


class RequestCleanup:
    """Layer that runs the clean-up of a request when it has ended: answered, refused, failed or left, streams too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on (the ASGI interface)."""
        with contextlib.ExitStack() as scope[_CLEANUP]:
            await self._app(scope, receive, send)


def cleanup(scope: Scope) -> contextlib.ExitStack:
    """Return the exit stack that is closed when the request has ended."""
    found: contextlib.ExitStack = scope[_CLEANUP]
    return found


class AtOnce(Protocol):
    """Writes parts of a reply without waiting: the server's."""

    @property
    def possible(self) -> bool:
        """Whether its client keeps up."""

    def __call__(self, body: bytes) -> None:
        """Write a part with what else is written in this round of the event loop, while that is possible."""

    def flush(self) -> None:
        """Write now what waits for the end of the round."""


class Write:
    """Writes a stream's body: `await write(data)`, or without waiting, where the client keeps up.

    Parameters
    ----------
    send
        The ASGI interface.
    at_once
        The server's, if it has one.

    Attributes
    ----------
    last_at
        When it wrote last (`time.monotonic`).
    """

    __slots__ = ("_send", "at_once", "last_at")

    def __init__(self, send: Send, at_once: AtOnce | None = None) -> None:
        self._send, self.at_once = send, at_once
        self.last_at = time.monotonic()

    async def __call__(self, data: bytes) -> None:
        """Write, and wait for a client that does not keep up."""
        if not self.now(data):
            await self.send({"type": "http.response.body", "body": data, "more_body": True})
            self.last_at = time.monotonic()

    def now(self, data: bytes) -> bool:
        """Write if the client keeps up; return whether that was done."""
        if not data:
            return True
        if self.at_once is None or not self.at_once.possible:
            return False
        self.at_once(data)
        self.last_at = time.monotonic()
        return True

    async def send(self, message: Message) -> None:
        """Send by the ASGI interface, after all that was written."""
        if self.at_once is not None:
            self.at_once.flush()
        await self._send(message)


def offer_write_at_once(scope: Scope, write: AtOnce) -> None:
    """Let the streams of a request write by this, as `Write` takes it."""
    scope[_WRITE_AT_ONCE] = write


class EventStream(Response):
    """A reply of server-sent events, written by a coroutine that is cancelled when the client disconnects.

    Starlette's own StreamingResponse takes an iterator, and needs a task group for it; here the coroutine writes whole
    batches to the server.

    Parameters
    ----------
    produce
        The coroutine, given what writes.
    keep_alive_s
        Seconds without an event after which a comment is written, which clients ignore; 0: none.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        produce: Callable[[Write], Awaitable[None]],
        headers: dict[str, str] | None = None,
        keep_alive_s: float = 0,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._produce = produce
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream (the ASGI interface)."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        direct: Send | None = scope.get(_SERVER_SEND)
        send = direct or send
        write = Write(send, scope.get(_WRITE_AT_ONCE) if direct else None)
        work = self._produce(write) if not self._keep_alive_s else _kept_alive(self._produce, write, self._keep_alive_s)
        if await until_disconnect(work, receive):
            await write.send({"type": "http.response.body", "body": b"", "more_body": False})


async def _kept_alive(produce: Callable[[Write], Awaitable[None]], write: Write, idle_s: float) -> None:
    """Run a producer, and write a comment whenever it has written nothing for so many seconds."""

    async def comment() -> None:
        while True:
            await asyncio.sleep(max(0.0, write.last_at + idle_s - time.monotonic()))
            if time.monotonic() >= write.last_at + idle_s:
                await write(_KEEP_ALIVE)

    comments = asyncio.create_task(comment())
    try:
        await produce(write)
    finally:
        comments.cancel()


async def until_disconnect(work: Awaitable[None], receive: Receive) -> bool:
    """Run `work` to its end, or cancel it when the client disconnects; return whether it ended."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return False
    return True


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
