"""The gateway as the ingress of an application: its ASGI application, in the replica that Serve sends requests to."""

import os
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from ares import config as configuration
from ares import logs
from ares.gateway.http.app import build
from ares.gateway.http.responses import DirectSend
from ares.models import resolve as models
from ares.parsers.loading import load as load_parsers


class Ingress:
    """A gateway.

    Parameters
    ----------
    settings
        Those of `ares gateway` that are given.
    instances
        Handles of the deployments of instances, which are only to be part of the application: the gateway talks to
        instances over HTTP and their control channels, past Ray.
    """

    def __init__(self, settings: Mapping[str, Any], *instances: Any) -> None:
        self._settings = settings

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the gateway's application (Serve calls this, `serve.ingress`)."""
        from ray import serve

        source = f"ray:{serve.get_replica_context().app_name}"
        given = {**self._settings, "service_discovery": [*self._settings.get("service_discovery", ()), source]}
        config = configuration.load(**given)
        if config.admin_key is None and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
            raise configuration.ConfigError(
                "behind Serve's HAProxy every client seems to be on loopback, which admin routes answer without a key: "
                "set ARES_ADMIN_KEY in runtime_env"
            )
        logs.configure(config.log_format, config.log_level)
        folder = models.resolve(config.model, weights=False)
        return WithoutPrefix(DirectSend(build(config, folder, parsers=load_parsers(config, folder))))


class WithoutPrefix:
    """Takes `route_prefix` off the path, as a proxy in front of `ares gateway` would."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on (the ASGI interface)."""
        prefix = scope.get("root_path", "").rstrip("/")
        if prefix and scope["path"].startswith(prefix):
            path = scope["path"].removeprefix(prefix) or "/"
            scope = {**scope, "path": path, "raw_path": path.encode(), "root_path": ""}
        await self._app(scope, receive, send)
