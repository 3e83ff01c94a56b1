"""The HTTP application: routes and layers around them."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from ares import __version__
from ares.config import GatewayConfig
from ares.gateway.http import admin, api_docs, completions, dashboard, errors, events
from ares.gateway.http.access import ClientKeys
from ares.gateway.http.body_limit import BodyLimit
from ares.gateway.http.refusals import RefusalCounter
from ares.gateway.http.responses import RequestCleanup, error
from ares.gateway.http.schema import ErrorReply
from ares.gateway.pool.instance import NoInstanceError
from ares.gateway.records import gauges
from ares.gateway.service import Gateway
from ares.gateway.shutdown import ShuttingDownError
from ares.gateway.tuning import DEFAULT, Tuning


def build(config: GatewayConfig, folder: Path, tuning: Tuning = DEFAULT) -> FastAPI:
    """Make the application of one gateway; it connects to its instances when it starts.

    Parameters
    ----------
    config
        The resolved configuration.
    folder
        Folder of the served model, for its tokenizer.
    tuning
        Times and limits that are no settings.
    """
    gateway = Gateway(config, folder, tuning)

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
    app.state.feed = events.Feed(gateway)
    app.include_router(events.router)
    app.include_router(dashboard.router)
    api_docs.register(app)
    _observability(app, gateway)
    errors.register(app)
    app.add_middleware(BodyLimit, limit=config.max_body_bytes)
    app.add_middleware(
        ClientKeys,
        keys=config.api_keys,
        protect_metrics=config.protect_metrics,
        maximum_streams=config.maximum_streams_per_key,
        retry_after_s=lambda: gateway.retry_after_s,
    )
    app.add_middleware(RequestCleanup)
    app.add_middleware(RefusalCounter, count=gateway.metrics.refuse, routes=lambda: app.routes)
    return app


def _observability(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one served model, under each of its names, and its LoRA adapters."""
        entry = {
            "object": "model",
            "created": 0,
            "owned_by": "ares",
            "max_model_len": gateway.maximum_model_tokens,
        }
        names = [{"id": name, **entry} for name in gateway.names]
        taken = set(gateway.names)
        adapters = [name for name in gateway.pool.adapters if name not in taken]
        return {"object": "list", "data": names + [{"id": n, **entry, "parent": gateway.names[0]} for n in adapters]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Answer that the gateway is alive."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"model": ErrorReply, "description": "No decode instance is ready."}})
    async def ready() -> JSONResponse:
        """Answer whether the gateway takes new requests and has an instance to decode them on."""
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
            "instances": {i.name: i.state.hello.versions for i in gateway.pool.instances if i.state.hello},
        }

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return Prometheus metrics."""
        gauges.update(gateway.metrics, gateway.pool.instances)
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)
