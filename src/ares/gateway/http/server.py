"""uvicorn's server, which finishes what runs before it stops."""

import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ares.gateway.service import Gateway


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
        await self.stop_taking()
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves it out then; it does not wait
            await self.lifespan.shutdown()

    async def stop_taking(self) -> None:
        """Take no more connections, where uvicorn does not see to it."""
