"""HTTP routes that an instance adds to vLLM's API server (entry point group `vllm.endpoint_plugins`)."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse

from ares.engine import instance
from ares.engine.drain import OwnChannel, drained_on_sigterm


class InstancePlugin:
    """Tells a gateway, which knows only an URL, where the control channel of this instance is, and drains it."""

    name = "ares"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Register the routes on vLLM's FastAPI app."""
        settings = instance.current()
        channel = OwnChannel(settings.control_address, instance.control_key())

        @app.get("/ares/v1/instance")  # type: ignore[untyped-decorator]
        async def describe() -> dict[str, str]:
            return {
                "name": settings.name,
                "role": settings.role,
                "boot": settings.boot,
                "control_address": settings.control_address,
            }

        @app.get("/ares/v1/ready")  # type: ignore[untyped-decorator]
        async def ready() -> JSONResponse:
            """Say whether new requests shall come; `/health` says whether the process is well."""
            load = channel.telemetry
            if load is None or load.draining:
                return JSONResponse({"status": "starting" if load is None else "draining"}, 503)
            return JSONResponse({"status": "ready"})

        app.router.lifespan_context = _with_drain(app.router.lifespan_context, channel, settings.drain_deadline_s)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Need nothing from the engine."""


def _with_drain(lifespan: Any, channel: OwnChannel, deadline_s: float) -> Any:
    """Extend the application's life by a drain at its end.

    vLLM's launcher installs its signal handlers before the application starts (entrypoints/launchers/launcher.py:
    serve_http), so ours takes the place of its SIGTERM's, and its SIGINT's is still there to end by.
    """

    @contextlib.asynccontextmanager
    async def extended(app: Any) -> AsyncIterator[Any]:
        following = asyncio.create_task(channel.follow(), name="own control channel")
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
            following.cancel()

    return extended
