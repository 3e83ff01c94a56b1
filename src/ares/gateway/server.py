"""`ares gateway`: the application on uvicorn."""

import logging
import socket

import uvicorn

from ares import model
from ares.config import GatewayConfig
from ares.gateway.app import build


def serve(config: GatewayConfig, listener: socket.socket | None = None) -> None:
    """Run a gateway until it is told to stop.

    Parameters
    ----------
    config
        The resolved configuration.
    listener
        A bound socket to serve on instead of the configured address.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    folder = model.resolve(config.model)
    server = uvicorn.Server(
        uvicorn.Config(
            build(config, folder),
            host=config.host,
            port=config.port,
            loop="uvloop",
            http="httptools",
            ws="none",
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=10,
        )
    )
    server.run(sockets=[listener] if listener else None)
