"""HTTP routes that an instance adds to vLLM's API server (entry point group `vllm.endpoint_plugins`)."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import REGISTRY
from starlette.responses import JSONResponse

from ares.engine import identity
from ares.engine.drain import OwnControlChannel, drained_on_sigterm
from ares.engine.forecast_metrics import ForecastCollector
from ares.protocol import messages
from ares.protocol.fields import INSTANCE_ROUTE, READY_ROUTE, Readiness


class InstancePlugin:
    """Describes this instance to gateways, which know only its URL, reports readiness, and drains it on SIGTERM."""

    name = "ares"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._description: messages.Description | None = None

    def attach_router(self, app: Any) -> None:
        """Register the routes on vLLM's FastAPI app."""
        settings = identity.current()
        channel = OwnControlChannel(settings.own_control_address, identity.control_key())
        # The model is known when vLLM calls `init_state`, before it serves.
        self._description = messages.Description(settings.name, settings.role, settings.boot, settings.control_address)

        @app.get(INSTANCE_ROUTE)  # type: ignore[untyped-decorator]
        async def describe() -> Any:
            load, described = channel.telemetry, msgspec.to_builtins(self._description)
            return described | ({"role": load.role} if load is not None and load.role is not None else {})

        @app.get(READY_ROUTE)  # type: ignore[untyped-decorator]
        async def ready() -> JSONResponse:
            """Return whether the instance takes new requests; `/health` is about the process."""
            load = channel.telemetry
            if load is None or load.draining:
                return JSONResponse({"status": Readiness.STARTING if load is None else Readiness.DRAINING}, 503)
            return JSONResponse({"status": Readiness.READY})

        app.router.lifespan_context = _with_drain(app.router.lifespan_context, channel, settings.drain_deadline_s)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Record the names of the model and its adapters; vLLM's defaults: launchers/api_server/app_state.py."""
        settings = identity.current()
        names = identity.served_names(args.served_model_name or [args.model], settings.model)
        self._description = identity.describe(
            settings, names, Path(args.model), [module.name for module in args.lora_modules or ()]
        )


def _with_drain(lifespan: Any, channel: OwnControlChannel, deadline_s: float) -> Any:
    """Drain the instance at the end of the application's lifespan, and show its forecast in the metrics meanwhile.

    vLLM's launcher installs its signal handlers before the application starts (entrypoints/launchers/launcher.py:
    serve_http), so ours replaces its SIGTERM handler, and its SIGINT handler remains to end the server.
    """

    @contextlib.asynccontextmanager
    async def extended(app: Any) -> AsyncIterator[Any]:
        following = asyncio.create_task(channel.follow(), name="own control channel")
        # vLLM's `/metrics` serves this registry (v1/metrics/prometheus.py, 0.32), unless several API servers share one.
        forecast = ForecastCollector(lambda: (channel.hello, channel.telemetry))
        REGISTRY.register(forecast)
        try:
            async with lifespan(app) as state:
                if deadline_s:
                    with drained_on_sigterm(
                        lambda: channel.drain(deadline_s), lambda: signal.raise_signal(signal.SIGINT)
                    ):
                        yield state
                else:
                    yield state
        finally:
            REGISTRY.unregister(forecast)
            following.cancel()

    return extended
