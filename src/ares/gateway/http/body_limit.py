"""Bodies of requests that are larger than the configured limit."""

from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ares.gateway.http.responses import error


class BodyLimit:
    """Refuses bodies above a limit, declared or not, without reading them whole.

    `limit` is in bytes, and so are the smaller ones of some paths.
    """

    def __init__(self, app: ASGIApp, limit: int, smaller: Mapping[str, int] | None = None) -> None:
        self._app = app
        self._limit = limit
        self._smaller = smaller or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 413 (the ASGI interface)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = min(self._limit, self._smaller.get(scope["path"], self._limit))
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not declared.isdigit() or int(declared) > limit:
            await _refuse(limit, scope, receive, send)
            return
        read = 0
        started = refused = False

        async def limited() -> Message:
            nonlocal read, refused
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                refused = True
                return {"type": "http.disconnect"}
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            if not refused:
                started = True
                await send(message)

        try:
            await self._app(scope, limited, watched)
        except Exception:
            if not refused:
                raise
        if refused and not started:
            await _refuse(limit, scope, receive, send)


async def _refuse(limit: int, scope: Scope, receive: Receive, send: Send) -> None:
    reply = error(413, f"the body is larger than {limit} bytes")
    await reply(scope, receive, send)
