"""`ares gateway`: the application on uvicorn."""

import gc
import logging
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ares import addresses
from ares.config import GatewayConfig
from ares.gateway.http.app import build
from ares.gateway.http.connection import Connection, Limits
from ares.gateway.http.responses import DirectSend
from ares.gateway.openai.parsing import Parsers
from ares.gateway.service import Gateway
from ares.models import resolve as models

logger = logging.getLogger(__name__)

LoadParsers = Callable[[GatewayConfig, Path], Parsers | None]

# For slow clients to read the ends of their streams.
_FLUSH_S = 5


class Server(uvicorn.Server):
    """On shutdown, serves until the running requests have ended, then ends the status feeds and itself."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal: the first one asks for a graceful shutdown, a second one for an end at once."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop serving."""
        gateway: Gateway = self._app.state.gateway
        await gateway.shutdown.drain(gateway.config.shutdown_timeout_s, lambda: self.force_exit)
        await self._app.state.feed.close()
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves it out then; it does not wait
            await self.lifespan.shutdown()


def serve(config: GatewayConfig, load_parsers: LoadParsers) -> None:
    """Run a gateway until a signal stops it; AddressError where it cannot listen."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Before the model, which may have to be fetched.
    addresses.check(config.host, {"--port": [config.port]})
    if (warning := config.exposure()) is not None:
        logger.warning(warning)
    folder = models.resolve(config.model, weights=False)
    app = build(config, folder, parsers=load_parsers(config, folder))
    server = Server(
        uvicorn.Config(
            DirectSend(app),
            host=config.host,
            port=config.port,
            loop="uvloop",
            http=partial(  # type: ignore[arg-type] # uvicorn only calls it
                Connection,
                Limits(config.max_head_bytes, config.idle_timeout_s, config.unread_timeout_s),
                app.state.gateway.metrics.refuse,
            ),
            ws="none",
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=_FLUSH_S,
            ssl_certfile=config.tls_certificate,
            ssl_keyfile=config.tls_key,
        ),
        app,
    )
    # Objects loaded by now stay: searching them for garbage again and again would be a good part of a token's cost.
    gc.collect()
    gc.freeze()
    server.run()
