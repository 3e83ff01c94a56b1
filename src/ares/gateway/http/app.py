"""The HTTP application: routes, and errors in OpenAI's form."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ares import __version__
from ares.config import GatewayConfig
from ares.gateway.http import admin, completions, dashboard
from ares.gateway.http import api_docs as reference
from ares.gateway.http import events as feed
from ares.gateway.http.access import ClientKeys, TooManyStreamsError, too_many_streams
from ares.gateway.http.refusals import Refusals
from ares.gateway.http.responses import Endings, error
from ares.gateway.http.schema import ErrorReply
from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.text import TemplateError
from ares.gateway.pool.generate import EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import NoInstanceError
from ares.gateway.records import gauges
from ares.gateway.service import Gateway
from ares.gateway.shutdown import ShuttingDownError

_SEVERAL_TYPES = {
    "arguments": "an object, or its JSON as text",
    "content": "text, or a list of parts",
    "prompt": "text, token ids, or a list of either",
    "stop": "text, or a list of texts",
}


def build(config: GatewayConfig, folder: Path) -> FastAPI:
    """Make the application of one gateway; it connects to its instances when it starts.

    Parameters
    ----------
    config
        The resolved configuration.
    folder
        Folder of the served model, for its tokenizer.
    """
    gateway = Gateway(config, folder)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        try:
            yield
        finally:
            await gateway.stop()

    # FastAPI's own pages load their scripts from a host of the internet.
    app = FastAPI(title="ARES gateway", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.gateway = gateway
    app.include_router(completions.router)
    app.include_router(admin.router)
    app.state.feed = feed.Feed(gateway)
    app.include_router(feed.router)
    app.include_router(dashboard.router)
    reference.register(app)
    _observability(app, gateway)
    _errors(app)
    app.add_middleware(BodyLimit, limit=config.max_body_bytes)
    app.add_middleware(
        ClientKeys,
        keys=config.api_keys,
        protect_metrics=config.protect_metrics,
        maximum_streams=config.maximum_streams_per_key,
        retry_after_s=lambda: gateway.retry_after_s,
    )
    app.add_middleware(Endings)
    app.add_middleware(Refusals, count=gateway.metrics.refuse, routes=lambda: app.routes)
    return app


def _observability(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one served model, under each of its names."""
        entry = {
            "object": "model",
            "created": 0,
            "owned_by": "ares",
            "max_model_len": gateway.maximum_model_tokens,
        }
        return {"object": "list", "data": [{"id": name, **entry} for name in gateway.names]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the gateway is alive."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"model": ErrorReply, "description": "No decode instance is ready."}})
    async def ready() -> JSONResponse:
        """Say whether new requests are taken, and there is an instance to serve them on."""
        if gateway.shutdown.begun:
            return error(503, "the gateway is shutting down", code=ShuttingDownError.code)
        if gateway.pool.ready:
            return JSONResponse({"status": "ready"})
        return error(503, f"no decode instance is ready: {gateway.pool.why_not_ready}", code=NoInstanceError.code)

    @app.get("/version")
    async def version() -> dict[str, Any]:
        """Return the versions of the gateway and of its instances."""
        return {
            "ares": __version__,
            "instances": {i.name: i.hello.versions for i in gateway.pool.instances if i.hello},
        }

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return Prometheus metrics."""
        gauges.show(gateway.metrics, gateway.pool.instances)
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _errors(app: FastAPI) -> None:
    @app.exception_handler(BadRequestError)
    async def bad_request(_: Request, failure: BadRequestError) -> JSONResponse:
        return error(failure.status, str(failure), failure.param, failure.code)

    @app.exception_handler(TemplateError)
    async def bad_messages(_: Request, failure: TemplateError) -> JSONResponse:
        return error(400, str(failure), "messages")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, failure: RequestValidationError) -> JSONResponse:
        first = failure.errors()[0]
        if first["loc"][0] == "body" and (unread := _not_json(request)) is not None:
            return error(415, unread)
        if first["type"] == "json_invalid":
            return error(400, f"the body is not JSON: {first['ctx']['error']}")
        if first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type"):
            return error(400, f"the body must be a JSON object{'' if failure.body else '; it is empty'}")
        name = _path(first["loc"][1:], failure.body, missing=first["type"] == "missing")
        return error(400, f"{name}: {_wanted(name) or first['msg']}" if name else first["msg"], name or None)

    @app.exception_handler(admin.AdminError)
    async def refused(_: Request, failure: admin.AdminError) -> JSONResponse:
        return error(failure.status, str(failure), code=failure.code)

    @app.exception_handler(TooManyStreamsError)
    async def too_many(request: Request, failure: TooManyStreamsError) -> Response:
        return too_many_streams(failure, request.app.state.gateway.retry_after_s)

    @app.exception_handler(HTTPException)
    async def http(request: Request, failure: HTTPException) -> JSONResponse:
        if failure.status_code == 400 and (unread := _not_json(request)) is not None:
            return error(415, unread)
        message = str(failure.detail)
        if failure.status_code == 400 and failure.__cause__ is not None:
            message = f"the body is not JSON that can be read: {_unreadable(failure.__cause__)}"
        if failure.status_code == 404:
            # Not `request.url`: it is put together with the client's Host header, and need not be a URL.
            message = f"no such route: {request.method} {request.scope['path']}"
        return error(failure.status_code, message, headers=dict(failure.headers or {}))

    async def generation(request: Request, failure: Exception) -> JSONResponse:
        status, message = completions.failed(failure)
        later = {"Retry-After": str(request.app.state.gateway.retry_after_s)}
        return error(status, message, code=completions.code(failure), headers=later if status == 503 else None)

    for kind in (NoInstanceError, ShuttingDownError, EngineLostError, EngineRefusedError, Exception):
        app.add_exception_handler(kind, generation)


def _not_json(request: Request) -> str | None:
    """Return why a body is not read, from what its headers say it is; None where they say JSON."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        return f"Content-Encoding {encoding} is not taken: send the body as it is"
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        return f"the body must be JSON, with Content-Type: application/json{kind and f' instead of {kind}'}"
    return None


def _unreadable(cause: BaseException) -> str:
    """Say why a body could not be read, where that is more than a mistake in its JSON."""
    match cause:
        case UnicodeDecodeError():
            return "it is not UTF-8"
        case RecursionError():
            return "it is nested too deeply"
        case ValueError():
            return "one of its numbers is too long"
    return type(cause).__name__


def _wanted(name: str) -> str | None:
    """Say what a field takes that takes several types; pydantic's own message names the first alone."""
    field = name.rpartition(".")[2]
    return f"should be {_SEVERAL_TYPES[field]}" if field in _SEVERAL_TYPES else None


def _path(location: tuple[Any, ...], body: Any, *, missing: bool) -> str:
    """Return the path of a mistake in the client's own words; pydantic's also names the types that it tried."""
    path: list[str] = []
    *tried, last = location or ("",)
    for part in tried if missing else location:
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]
            path.append(str(part))
    return ".".join([*path, str(last)] if missing else path)


class BodyLimit:
    """Refuses bodies above a limit, declared or not, without reading them whole."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 413 (the ASGI interface)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not declared.isdigit() or int(declared) > self._limit:
            await self._refuse(scope, receive, send)
            return
        read = 0
        started = refused = False

        async def limited() -> Message:
            nonlocal read, refused
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
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
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = error(413, f"the body is larger than {self._limit} bytes")
        await reply(scope, receive, send)
