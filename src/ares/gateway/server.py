"""`ares gateway`: the application on uvicorn."""

import gc
import logging
import socket
from functools import partial

import uvicorn
from fastapi import FastAPI

from ares import model
from ares.config import GatewayConfig
from ares.gateway.app import build
from ares.gateway.connection import Connection, Limits
from ares.gateway.responses import RememberSend


class Server(uvicorn.Server):
    """Ends the streams of those who watch before it waits for the requests that run."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop serving."""
        await self._app.state.feed.close()
        await super().shutdown(sockets)


def serve(config: GatewayConfig) -> None:
    """Run a gateway until it is told to stop."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    folder = model.resolve(config.model)
    app = build(config, folder)
    server = Server(
        uvicorn.Config(
            RememberSend(app),
            host=config.host,
            port=config.port,
            loop="uvloop",
            http=partial(  # type: ignore[arg-type] # uvicorn only calls it
                Connection, Limits(config.max_head_bytes, config.idle_timeout_s, config.unread_timeout_s)
            ),
            ws="none",
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=10,
            ssl_certfile=config.tls_certificate,
            ssl_keyfile=config.tls_key,
        ),
        app,
    )
    # What is loaded by now stays: searching it for garbage again and again would be a good part of a token's cost.
    gc.collect()
    gc.freeze()
    server.run()
