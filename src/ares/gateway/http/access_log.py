"""The access log: one line a request that has ended, with path, status and duration, and nothing of its content."""

import logging
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ares.protocol.fields import REQUEST_ID_HEADER

logger = logging.getLogger("ares.access")

# What probes and scrapers ask for all the time.
_ROUTINE = frozenset(["/health", "/ready", "/metrics"])
# As web servers log a client that left before its reply began.
_LEFT = 499


class AccessLog:
    """Layer that logs requests, around all others; those of probes and scrapers only at the level `debug`.

    Parameters
    ----------
    clock
        Returns seconds.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on (the ASGI interface)."""
        level = logging.DEBUG if scope.get("path") in _ROUTINE else logging.INFO
        if scope["type"] != "http" or not logger.isEnabledFor(level):
            await self._app(scope, receive, send)
            return
        began = self._clock()
        status, request_id = _LEFT, ""

        async def noted(message: Message) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = Headers(raw=message["headers"]).get(REQUEST_ID_HEADER, "")
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = 500 if status == _LEFT else status  # as the server answers
            raise
        finally:
            # The path as it was sent, percent-encoded: it cannot break a line. The query may hold anything.
            fields = {
                "client": scope["client"][0] if scope.get("client") else "",
                "method": scope["method"],
                "path": scope["raw_path"].decode("ascii", "backslashreplace"),
                "status": status,
                "duration_s": round(self._clock() - began, 6),
                "request_id": request_id,
            }
            text = "%(client)s %(method)s %(path)s %(status)d %(duration_s).3f s %(request_id)s"
            logger.log(level, "%s", (text % fields).rstrip(), extra=fields)
