"""`ares gateway`: the application on uvicorn."""

import gc
import logging
import socket

import uvicorn

from ares import model
from ares.config import GatewayConfig
from ares.gateway.app import build
from ares.gateway.responses import RememberSend


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
            RememberSend(build(config, folder)),
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
    # What is loaded by now stays: searching it for garbage again and again would be a good part of a token's cost.
    gc.collect()
    gc.freeze()
    server.run(sockets=[listener] if listener else None)
