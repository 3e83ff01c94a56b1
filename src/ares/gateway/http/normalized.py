"""Requests in one form for the layers and routes inside: HEAD as GET, and paths without slashes that mean nothing."""

import re
import urllib.parse

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SLASHES = re.compile(rb"/{2,}")
# Their links are relative: with a slash at the end, a browser is redirected.
_PAGES = (b"/dashboard/", b"/docs/")


class Normalized:
    """Layer that lets HEAD be answered as GET without the body, and `//v1/models/` as `/v1/models`.

    Every server must support HEAD (RFC 9110, 9.1). Base URLs with a slash at the end make paths with doubled ones; a
    redirect to the other spelling would lead clients behind a proxy to the wrong scheme, and many follow none.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on (the ASGI interface)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Before the percent-encoding is taken off: an encoded slash belongs to a name.
        given: bytes = scope["raw_path"]
        path = _SLASHES.sub(b"/", given)
        if len(path) > 1 and path not in _PAGES:
            path = path.removesuffix(b"/")
        if path != given:
            scope = {**scope, "raw_path": path, "path": urllib.parse.unquote(path.decode("ascii"))}
        if scope["method"] == "HEAD":
            await self._head(scope, send)
        else:
            await self._app(scope, receive, send)

    async def _head(self, scope: Scope, send: Send) -> None:
        started = False

        async def without_body(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                await send(message)

        await self._app({**scope, "method": "GET"}, _nothing_follows, without_body)
        if started:
            await send({"type": "http.response.body", "body": b""})


async def _nothing_follows() -> Message:
    """Receive: a reply that is written as long as its client is there ends after its head."""
    return {"type": "http.disconnect"}
