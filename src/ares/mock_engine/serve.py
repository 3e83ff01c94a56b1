"""Serves mock instances: `ares worker --simulate PROFILE`, one process, one or many instances."""

import asyncio
import gc
import ipaddress
import logging
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
import zmq

from ares import addresses
from ares.engine.drain import drained_on_sigterm, gateway_deadline, wait_until_empty
from ares.free_ports import free_port
from ares.mock_engine import report
from ares.mock_engine.faults import Faults
from ares.mock_engine.http import MALFORMED, Connection, HttpError, HttpRequest, decode, handler
from ares.mock_engine.instance import Instance
from ares.mock_engine.model import MockModel, load
from ares.mock_engine.request import Request
from ares.mock_engine.settings import EngineSettings, Identity
from ares.mock_engine.transfer import EXTEND_ROUTE, PULL_ROUTE, Extend, Pull, Pulled, Puller, transfer_s
from ares.mock_engine.writer import catch_up
from ares.protocol import fields
from ares.protocol.messages import Role

logger = logging.getLogger(__name__)

_BACKLOG = 4096
# Time for the answer to a `die` fault to leave before the connections close.
_REPLY_S = 0.02
# How long a control port may still be taken by the instance that had it before.
_REBIND_S = 2.0
_NO_KV = Pulled(0, 0)
# Answers a request to an instance.
Handler = Callable[[Instance, HttpRequest, Connection], None]


class Server:
    """One instance behind its port: routes, and its crashes and restarts by fault."""

    def __init__(self, identity: Identity, settings: EngineSettings, model: MockModel, puller: Puller) -> None:
        self.connections: set[Connection] = set()
        self.instance: Instance | None = None
        self.make: Callable[[], Instance] = lambda: Instance(identity, settings, model, puller)
        self.identity = identity
        self._loop = asyncio.get_running_loop()
        self._server: asyncio.Server | None = None
        self._restarts: set[asyncio.Task[None]] = set()
        self._routes = self._table()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{addresses.with_port(self.identity.host, self.identity.port)}"

    async def start(self) -> None:
        """Begin to serve; OSError where a port is taken."""
        instance = await self._made()
        try:
            self._server = await self._loop.create_server(
                self.connect, self.identity.host, self.identity.port, backlog=_BACKLOG
            )
        except OSError:
            instance.close()
            raise
        # Only now: a caller that sees the instance may connect.
        self.instance = instance

    def connect(self) -> Connection:
        """Return what serves a new connection; a subclass may serve it otherwise."""
        return Connection(self)

    async def _made(self) -> Instance:
        """Make the instance; ZeroMQ lets a port go a little after its socket is closed."""
        deadline = self._loop.time() + _REBIND_S
        while True:
            try:
                return self.make()
            except zmq.ZMQError as error:
                if self._loop.time() > deadline:
                    raise OSError(f"control port {self.identity.control_port}: {error}") from error
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """Close everything at once: connections, requests, KV, control channel."""
        for task in self._restarts:
            task.cancel()
        if self._server is not None:
            self._server.close()
            self._server = None
        instance, self.instance = self.instance, None
        for connection in list(self.connections):
            connection.work = None
            connection.transport.abort()
        if instance is not None:
            instance.close()

    # --- what a connection asks of its service ---

    def answer(self, request: HttpRequest, connection: Connection) -> None:
        """Answer a request."""
        instance = self.instance
        if instance is None:
            connection.transport.abort()
            return
        frozen = instance.faults.frozen_s
        if frozen and request.path != fields.FAULTS_ROUTE.encode():
            self._loop.call_later(frozen, self._answer_late, request, connection)
            return
        handler(self._routes, request)(instance, request, connection)

    def _answer_late(self, request: HttpRequest, connection: Connection) -> None:
        if connection.transport.is_closing():
            return
        try:
            self.answer(request, connection)
        except HttpError as error:
            connection.refuse(error)

    def _table(self) -> dict[tuple[bytes, bytes], Handler]:
        """Return what answers each method and path."""

        def reply(make: Callable[[Instance], Any]) -> Handler:
            return lambda instance, request, connection: connection.reply(make(instance))

        return {
            (b"POST", fields.GENERATE_ROUTE.encode()): _generate,
            (b"GET", b"/health"): reply(lambda instance: {}),
            (b"GET", fields.READY_ROUTE.encode()): _ready,
            (b"GET", b"/version"): reply(report.version),
            (b"GET", b"/metrics"): reply(report.metrics),
            (b"GET", fields.MODELS_ROUTE.encode()): reply(report.models),
            (b"GET", fields.INSTANCE_ROUTE.encode()): reply(report.description),
            (b"GET", fields.COUNTERS_ROUTE.encode()): reply(report.counters),
            (b"GET", fields.FAULTS_ROUTE.encode()): self._faults,
            (b"POST", fields.FAULTS_ROUTE.encode()): self._faults,
            (b"POST", PULL_ROUTE.encode()): self._pull,
            (b"POST", EXTEND_ROUTE.encode()): _extend,
        }

    def caught_up(self, connection: Connection) -> None:
        """Send the tokens that were delayed."""
        if isinstance(connection.work, Request):
            catch_up(connection.work)

    def disconnected(self, connection: Connection) -> None:
        """Abort the request of a client that has disconnected."""
        if self.instance is not None and isinstance(connection.work, Request):
            self.instance.abort(connection.work)

    # --- between instances ---

    def _pull(self, instance: Instance, request: HttpRequest, connection: Connection) -> None:
        """Answer another instance's pull once its bytes would have arrived."""
        wanted = decode(request.body, Pull)
        pin = instance.pins.find(wanted.request_id) if wanted.engine_id == instance.boot else None
        if pin is None:
            raise HttpError(404, "no such KV is pinned here")
        if wanted.discard:
            instance.pins.pulled(pin)
            connection.reply(_NO_KV)
            return
        instance.pins.extend([pin.id])

        def arrived() -> None:
            if connection.transport.is_closing() or self.instance is not instance:
                return  # the puller is gone: the lease ends the pin
            if instance.pins.find(pin.id) is not pin:
                connection.refuse(HttpError(404, "the lease of the KV ended, or it was pulled already"))
                return
            instance.pins.pulled(pin)
            connection.reply(Pulled(pin.tokens, pin.hash ^ instance.faults.current.wrong_kv))

        self._loop.call_later(transfer_s(instance.settings, max(0, pin.tokens - wanted.cached)), arrived)

    # --- faults ---

    def _faults(self, instance: Instance, request: HttpRequest, connection: Connection) -> None:
        if not ipaddress.ip_address(connection.peer.partition("%")[0] or "0.0.0.0").is_loopback:  # noqa: S104 - an unknown peer
            raise HttpError(403, "faults are for loopback only")
        if request.method == b"GET":
            connection.reply(instance.faults.current)
            return
        try:
            asked = instance.faults.change(request.body)
        except (*MALFORMED, TypeError) as error:
            raise HttpError(400, f"1 validation error: {error}") from error
        logger.warning("%s: faults: %s", self.identity.name, asked)
        connection.reply(asked)
        if asked.drop_streams:
            for other in list(self.connections):
                if other.work is not None:
                    other.transport.abort()
        if asked.die:
            self._loop.call_later(_REPLY_S, self._crash, asked)

    def _crash(self, asked: Faults) -> None:
        self.stop()
        if asked.restart_after_s is not None:
            task = self._loop.create_task(self._restart(asked.restart_after_s))
            self._restarts.add(task)
            task.add_done_callback(self._restarts.discard)

    async def _restart(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        try:
            await self.start()
        except Exception:
            logger.exception("%s could not restart", self.identity.name)


def _generate(instance: Instance, request: HttpRequest, connection: Connection) -> None:
    if instance.faults.current.refuse:
        raise HttpError(503, "the mock engine refuses new requests (/simulate/faults)")
    instance.add(request.body, connection)


def _ready(instance: Instance, request: HttpRequest, connection: Connection) -> None:
    if instance.draining:
        connection.reply({"status": "draining"}, 503)
    else:
        connection.reply({"status": "ready"})


def _extend(instance: Instance, request: HttpRequest, connection: Connection) -> None:
    wanted = decode(request.body, Extend)
    if wanted.engine_id == instance.boot:
        instance.pins.extend(wanted.request_ids)
    connection.reply(_NO_KV)


def identities(
    name: str | None,
    role: Role,
    host: str,
    port: int,
    control_port: int,
    count: int,
    advertise_host: str = "",
    *,
    fixed_role: bool = False,
) -> list[Identity]:
    """Return `count` identities: consecutive ports, numbered names; a control port of 0 is any free one."""
    found: list[Identity] = []
    taken: set[int] = set(range(port, port + count))
    for n in range(count):
        control = control_port + n if control_port else free_port(host, taken)
        taken.add(control)
        numbered = f"{name}-{n}" if name and count > 1 else name
        own_name = numbered or f"{role}-{port + n}"
        found.append(Identity(own_name, role, host, port + n, control, advertise_host, fixed_role))
    return found


def serve(found: list[Identity], settings: EngineSettings, folder: Path, drain_deadline_s: float = 0.0) -> None:
    """Serve instances until the process is stopped; a SIGTERM drains them first, unless its deadline is 0.

    Raises
    ------
    VocabularyError
        The model folder has no usable tokenizer.
    OSError
        A port is taken.
    """
    model = load(folder, settings.mean_output, settings.output_sigma)
    settings = replace(settings, folder=folder)
    # What is loaded by now lives to the end: keep it out of every garbage collection.
    gc.collect()
    gc.freeze()
    uvloop.run(_serve(found, settings, model, drain_deadline_s))


async def _serve(found: list[Identity], settings: EngineSettings, model: MockModel, drain_deadline_s: float) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    # One connection for each pull: a kept one could belong to a source that has restarted since.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as http:
        servers = [Server(identity, settings, model, Puller(http)) for identity in found]
        try:
            for server in servers:
                await server.start()
                logger.info("%s: a mock engine on %s", server.identity.name, server.url)
            with drained_on_sigterm(lambda: _drain(servers, drain_deadline_s), ended.set):
                await ended.wait()
        finally:
            for server in servers:
                server.stop()


async def _drain(servers: list[Server], deadline_s: float) -> None:
    alive = [server.instance for server in servers if server.instance is not None]
    for instance in alive:
        instance.drain(gateway_deadline(deadline_s))
    await wait_until_empty(lambda: sum(instance.left for instance in alive), deadline_s)
