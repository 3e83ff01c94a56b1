"""What the processes of an address ask each other for: what each knows for itself, and commands of clients."""

from collections.abc import Awaitable, Callable

import msgspec
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ares.gateway.http.request_ids import resolve
from ares.gateway.models import Models
from ares.gateway.processes import together
from ares.gateway.processes.siblings import (
    MEMBERSHIP_ROUTE,
    METRICS_ROUTE,
    REQUESTS_ROUTE,
    STATUS_ROUTE,
    Siblings,
    mark,
)

Answer = Callable[[Request], Awaitable[Response]]


def application(app: FastAPI) -> ASGIApp:
    """Return what answers on the socket for siblings, in a folder that only the user of the processes can open."""
    models: Models = app.state.models
    siblings: Siblings = app.state.siblings

    async def status(request: Request) -> Response:
        after = int(request.query_params["moves_after"])
        return _json(together.own_part(models, after))

    async def requests(request: Request) -> Response:
        return _json(resolve(request.query_params["given"], models.sessions))

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(await together.process_metrics(models, siblings))

    async def membership(_: Request) -> Response:
        return _json(models.first.membership.given)

    routes: dict[str, Answer] = {
        STATUS_ROUTE: status,
        REQUESTS_ROUTE: requests,
        METRICS_ROUTE: metrics,
        MEMBERSHIP_ROUTE: membership,
    }
    return Starlette(routes=[*(Route(path, answer) for path, answer in routes.items()), Mount("/", _Commands(app))])


class _Commands:
    """The routes of operators, for commands that a sibling has got and passes on, with the key of the client."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer for this process alone (the ASGI interface)."""
        mark(scope)
        scope["client"] = ("127.0.0.1", 0)  # a Unix socket has no address, and is of this machine
        await self._app(scope, receive, send)


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
