"""The HTTP application: routes and layers around them."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from ares import __version__
from ares.config import GatewayConfig
from ares.gateway.http import (
    admin,
    api_docs,
    completion_routes,
    dashboard,
    errors,
    events,
    instances,
    messages_routes,
    model_list,
    not_offered,
    predictor,
    responses_routes,
    tokenization_routes,
    workers,
)
from ares.gateway.http.access import ClientKeys
from ares.gateway.http.access_log import AccessLog
from ares.gateway.http.body_limit import BodyLimit
from ares.gateway.http.cors import ApiCors
from ares.gateway.http.normalized import Normalized
from ares.gateway.http.refusals import RefusalCounter
from ares.gateway.http.responses import RequestCleanup, error
from ares.gateway.http.schema import ErrorReply
from ares.gateway.models import Models, ServedModel
from ares.gateway.openai.parsing import Parsers
from ares.gateway.pool.instance import NoInstanceError
from ares.gateway.processes import together
from ares.gateway.processes.siblings import Siblings, siblings_of
from ares.gateway.shutdown import ShuttingDownError
from ares.gateway.tuning import DEFAULT, Tuning
from ares.protocol.learner_report import LARGEST_REPORT_BYTES


def build(
    config: GatewayConfig,
    folder: Path,
    tuning: Tuning = DEFAULT,
    parsers: Parsers | None = None,
    siblings: Siblings | None = None,
    further: Sequence[ServedModel] = (),
) -> FastAPI:
    """Make the application of one gateway; it connects to its instances when it starts.

    Parameters
    ----------
    config
        The resolved configuration; of several models, that of the first.
    folder
        Folder of its model, for the tokenizer.
    tuning
        Times and limits that are no settings.
    parsers
        Parsers of reasoning and tool calls, if any.
    siblings
        The other processes of the gateway; None: it is the only one.
    further
        The other models.
    """
    counts = siblings.counts if siblings is not None else None
    models = Models([ServedModel(config, folder, parsers), *further], tuning, counts)
    gateway = models.first

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await models.start()
        try:
            yield
        finally:
            await models.stop()
            if siblings is not None:
                await siblings.close()

    # FastAPI's own pages load their scripts from a host of the internet.
    documented = None if config.disable_fastapi_docs else "/openapi.json"
    app = FastAPI(
        title="ARES gateway",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=documented,
    )
    app.state.models, app.state.gateway, app.state.siblings = models, gateway, siblings
    app.state.template_traits = {}
    for routes in (completion_routes, responses_routes, messages_routes, tokenization_routes, model_list, not_offered):
        app.include_router(routes.router)
    app.include_router(admin.router)
    app.include_router(instances.router)
    app.include_router(workers.router)
    app.include_router(predictor.router)
    app.state.feed = events.Feed(models, siblings)
    app.include_router(events.router)
    app.include_router(dashboard.router)
    if documented is not None:
        api_docs.register(app)
    _observability(app, models)
    errors.register(app)
    app.add_middleware(BodyLimit, limit=config.max_body_bytes, smaller={predictor.PATH: LARGEST_REPORT_BYTES})
    app.add_middleware(
        ClientKeys,
        keys=config.api_keys,
        protect_metrics=config.protect_metrics,
        maximum_streams=config.maximum_streams_per_key,
        retry_after_s=lambda: models.retry_after_s,
        counts=gateway.counts,
    )
    app.add_middleware(RequestCleanup)
    if config.allowed_origins:
        # Around the keys: a browser asks without them what it may send.
        app.add_middleware(
            ApiCors,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
        )
    app.add_middleware(RefusalCounter, count=gateway.metrics.refuse, routes=lambda: app.routes)
    app.add_middleware(Normalized)
    if config.access_log:
        app.add_middleware(AccessLog)
    return app


def _observability(app: FastAPI, models: Models) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Answer that the gateway is alive."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"model": ErrorReply, "description": "No decode instance is ready."}})
    async def ready() -> JSONResponse:
        """Answer whether the gateway takes new requests and has an instance to decode them on, of any model."""
        if models.first.shutdown.begun:
            return error(503, "the gateway is shutting down", code=ShuttingDownError.code)
        waiting = {one.names[0]: one.pool.why_not_ready for one in models if not one.pool.ready}
        if len(waiting) < len(models.names):
            each = {"models": {name: waiting.get(name, "ready") for name in models.names}} if models.several else {}
            return JSONResponse({"status": "ready", **each})
        why = "; ".join(f"{name}: {why}" if models.several else why for name, why in waiting.items())
        return error(503, f"no decode instance is ready: {why}", code=NoInstanceError.code)

    @app.get("/version")
    async def version() -> dict[str, Any]:
        """Return the versions of the gateway and of its instances."""
        return {
            "ares": __version__,
            "instances": {i.name: i.state.hello.versions for i in models.instances if i.state.hello},
        }

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        """Return Prometheus metrics."""
        return Response(await together.metrics(models, siblings_of(request)), media_type=CONTENT_TYPE_LATEST)
