"""Web pages of other origins that may call the gateway: vLLM's ``--allowed-origins``, for the API alone."""

from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send


class ApiCors:
    """Layer that answers browsers which ask whether a page may call a route below ``/v1``.

    The operator's routes are left out: where they have no key they trust this machine, and so a browser on it.

    Parameters
    ----------
    options
        Those of Starlette's CORSMiddleware.
    """

    def __init__(self, app: ASGIApp, /, **options: Any) -> None:
        self._app = app
        self._cors = CORSMiddleware(app, **options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on (the ASGI interface)."""
        api = scope["type"] == "http" and scope["path"].startswith("/v1/")
        await (self._cors if api else self._app)(scope, receive, send)
