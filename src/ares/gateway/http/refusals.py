"""Requests that are answered with an error, counted by route, status and reason; all three have few values."""

from collections.abc import Callable, Iterable

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ares.gateway.http.responses import error_code

# Of a request that leads to no route, or is malformed.
NO_ROUTE = "other"
# Where an error has no code, or one that may have any value.
_BY_STATUS = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    431: "head_too_large",
    500: "internal_error",
    502: "instance_failed",
    503: "unavailable",
}
_CODES = frozenset(
    [
        "model_not_found",
        "context_length_exceeded",
        "request_not_found",
        "instance_not_found",
        "target_unavailable",
        "last_instance",
        "unknown_preset",
        "no_instance_ready",
        "queue_full",
        "waited_too_long",
        "shutting_down",
        "malformed_http",
        "not_offered",
        "response_not_found",
    ]
)
# The client has left: no request was refused.
_CLIENT_LEFT = 499

Count = Callable[[str, int, str | None], None]


def reason(status: int, code: str | None) -> str:
    """Return the reason of an error, one of a closed set."""
    return code if code in _CODES else _BY_STATUS.get(status, "server_error" if status >= 500 else "invalid_request")


class RefusalCounter:
    """Layer that counts refused requests, around the layers that refuse them.

    Parameters
    ----------
    count
        Called with the route, the status and the error's code.
    routes
        Returns the application's routes.
    """

    def __init__(self, app: ASGIApp, count: Count, routes: Callable[[], Iterable[BaseRoute]]) -> None:
        self._app, self._count, self._routes = app, count, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on (the ASGI interface)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = status or 500  # as the layer around this one answers
            raise
        finally:
            if status >= 400 and status != _CLIENT_LEFT:
                self._count(self._route(scope), status, error_code(scope))

    def _route(self, scope: Scope) -> str:
        """Return the template of the route that a request leads to, its method aside."""
        for route in self._routes():
            if route.matches(scope)[0] is not Match.NONE:
                return str(getattr(route, "path", NO_ROUTE))
        return NO_ROUTE
