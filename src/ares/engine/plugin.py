"""HTTP routes that an instance adds to vLLM's API server (entry point group `vllm.endpoint_plugins`)."""

from typing import Any

from ares.engine import instance


class InstancePlugin:
    """Tells a gateway, which knows only an URL, where the control channel of this instance is."""

    name = "ares"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Register the routes on vLLM's FastAPI app."""

        @app.get("/ares/v1/instance")  # type: ignore[untyped-decorator]
        async def describe() -> dict[str, str]:
            settings = instance.current()
            return {
                "name": settings.name,
                "role": settings.role,
                "boot": settings.boot,
                "control_address": settings.control_address,
            }

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Need nothing from the engine."""
