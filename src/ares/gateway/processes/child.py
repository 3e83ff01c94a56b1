"""One process of an address: a gateway whose connections come from its parent."""

import asyncio
import contextlib
import logging
import shutil
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from ares.gateway.http.server import Server
from ares.gateway.models import Models
from ares.gateway.processes import from_sibling, kept_metrics
from ares.gateway.processes.acceptor import CONNECTION, LEAVES, TAKES
from ares.gateway.processes.siblings import MEMBERSHIP_ROUTE, Siblings

logger = logging.getLogger(__name__)

# Between two looks at whether the socket for siblings is there.
SOCKET_CHECK_S = 5.0
# Between two notes that this process runs.
_BEAT_S = 0.1
# For connections that the parent had handed out before it knew that this process takes no more.
_LAST_CONNECTIONS_S = 0.05


class ChildServer(Server):
    """Serves the connections that come over a link, and its siblings over a Unix socket.

    Parameters
    ----------
    config
        uvicorn's, of the application.
    app
        The application.
    siblings
        The other processes.
    link
        The socket to the parent. Signals go to the parent, which passes the shutdown on; when it is gone, this process
        shuts down too.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, siblings: Siblings, link: socket.socket) -> None:
        super().__init__(config, app)
        self._models: Models = app.state.models
        self._siblings = siblings
        self._link = link
        self._adopting: set[asyncio.Task[None]] = set()
        self._for_siblings = uvicorn.Config(
            from_sibling.application(app),
            http="httptools",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals as they are: they are for the parent."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to serve."""
        await super().startup([])
        counts = self._siblings.counts
        self._siblings.make_folder()
        self._siblings.ended_metrics = kept_metrics.begin(self._siblings.folder, counts.process)
        await self._listen()
        # From here on siblings tell it of a new preset, and of instances that are added or removed.
        await self._take_over_membership()
        for gateway in self._models:
            if counts.preset != gateway.controller.preset:
                gateway.controller.use_preset(counts.preset)
        self._beat()
        self._listening = asyncio.create_task(self._stay_reachable())
        asyncio.get_running_loop().add_reader(self._link, self._read_link)
        self._tell_parent(TAKES)

    async def _take_over_membership(self) -> None:
        """Learn from a sibling which instances operators have added and removed, where one runs already."""
        for process in self._siblings.counts.others:
            answer = await self._siblings.ask(process, MEMBERSHIP_ROUTE)
            if answer is not None and answer.status == 200:
                self._models.first.membership.take_over(answer.json())
                return

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop serving."""
        await super().shutdown(sockets)
        self._listening.cancel()
        self._siblings_server.close()
        self._next_beat.cancel()

    async def stop_taking(self) -> None:
        """Take no more connections."""
        self._tell_parent(LEAVES)
        await asyncio.sleep(_LAST_CONNECTIONS_S)
        asyncio.get_running_loop().remove_reader(self._link)

    async def _listen(self) -> None:
        """Listen for siblings, in place of the process that was here before."""
        path = self._siblings.socket(self._siblings.counts.process)
        path.unlink(missing_ok=True)
        factory = partial(_protocol, self._for_siblings, ServerState(), self.lifespan.state)
        self._siblings_server = await asyncio.get_running_loop().create_unix_server(factory, str(path))

    async def _stay_reachable(self) -> None:
        """Listen again where something that cleans the temporary directory has removed the socket."""
        path = self._siblings.socket(self._siblings.counts.process)
        failed = False
        while True:
            await asyncio.sleep(SOCKET_CHECK_S)
            if path.exists() or self.should_exit:
                continue
            before = self._siblings_server
            try:
                self._siblings.make_folder()
                await self._listen()
            except OSError as error:
                if not failed:
                    logger.error("%s is gone: the other processes cannot ask this one: %s", path, error)
                failed = True
                continue
            before.close()
            failed = False
            logger.warning("%s was removed, and is there again: keep it out of what is cleaned", path)

    def _beat(self) -> None:
        """Note again and again that this process runs: also while it shuts down, when it may still have streams."""
        self._siblings.counts.beat()
        self._next_beat = asyncio.get_running_loop().call_later(_BEAT_S, self._beat)

    def _read_link(self) -> None:
        """Read what the parent says."""
        while True:
            try:
                message, descriptors, *_ = socket.recv_fds(self._link, 1, 1)
            except BlockingIOError:
                return
            except OSError:
                message, descriptors = b"", []
            if message == CONNECTION:
                if descriptors:
                    self._adopt(socket.socket(fileno=descriptors[0]))
                else:  # Linux closes it then
                    logger.error("a connection is lost: this process has too many files open (ulimit -n)")
                continue
            # A second order ends everything at once.
            self.force_exit = self.should_exit
            self.should_exit = True
            if not message:
                logger.error("the parent process of this gateway has ended")
                asyncio.get_running_loop().remove_reader(self._link)
                shutil.rmtree(self._siblings.folder, ignore_errors=True)  # otherwise nobody would
                return

    def _adopt(self, connection: socket.socket) -> None:
        task = asyncio.create_task(self._serve_connection(connection))
        self._adopting.add(task)
        task.add_done_callback(self._adopted)
        self._count_connections()

    def _adopted(self, task: asyncio.Task[None]) -> None:
        self._adopting.discard(task)
        self._count_connections()

    def _count_connections(self) -> None:
        """Tell the parent, which hands the next connection to the process with the fewest."""
        self._siblings.counts.set_connections(len(self.server_state.connections) + len(self._adopting))

    async def _serve_connection(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        state, count = self.server_state, self._count_connections
        factory = partial(_protocol, self.config, state, self.lifespan.state, on_lost=count)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(factory, connection, ssl=self.config.ssl)
        except OSError as error:  # the client has left, or does not speak TLS
            logger.debug("a connection was not taken: %s", error)
            connection.close()

    def _tell_parent(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._link.send(message)


def _protocol(
    config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any], **further: Any
) -> asyncio.Protocol:
    if not config.loaded:
        config.load()
    made: Any = config.http_protocol_class
    protocol: asyncio.Protocol = made(config=config, server_state=server_state, app_state=app_state, **further)
    return protocol
