"""A mock instance that tests steer: a server of the mock engine, what a test changes about it, and what it has seen."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

import aiohttp

from ares import free_ports
from ares.mock_engine.http import Connection, HttpError, HttpRequest
from ares.mock_engine.model import fold
from ares.mock_engine.pins import Pin, Pins
from ares.mock_engine.request import Request
from ares.mock_engine.serve import Server
from ares.mock_engine.settings import Identity
from ares.protocol import fields, messages
from tests.gateway.fakes.connection import FaultyConnection
from tests.gateway.fakes.control import BLOCK
from tests.gateway.fakes.engine import SteeredInstance, SteeredPuller, settings
from tests.gateway.fakes.faults import Faults
from tests.gateway.fakes.tokens import mock_model
from tests.waiting import eventually

_GENERATE = fields.GENERATE_ROUTE.encode()
_INSTANCE = fields.INSTANCE_ROUTE.encode()
_MODELS = fields.MODELS_ROUTE.encode()
_IDLE_S = 0.002


def free_port() -> int:
    """Return a port of this machine that no process listens on."""
    return free_ports.free_port("127.0.0.1")


class FakeInstance:
    """One instance, over all its lives."""

    def __init__(
        self,
        name: str,
        role: messages.Role,
        *,
        step_s: float = 0.002,
        vocabulary: int = 256,
        eos_at: int | None = None,
        kv_blocks: int = 1000,
        max_model_len: int = 4096,
        prefix_caching: bool = True,
        carries: tuple[str, ...] = (),
        step_tokens: bool = False,
    ) -> None:
        self.name = name
        self.role = role
        self.step_s = step_s
        self.model = mock_model(vocabulary)
        self.eos_at = eos_at
        """Tokens of prompt and output after which the stop token comes."""
        self.kv_blocks = kv_blocks
        self.max_model_len = max_model_len
        self.prefix_caching = prefix_caching
        self.carries = carries
        """What it says to restore, from the next start on."""
        self.roles: list[messages.Role] | None = None
        """Roles that it says it can have, from the next start on; None: all."""
        self.announced: list[str] = []
        """Keys of the requests that were to be expected."""
        self.leases = True
        """Whether it is of a version that answers a `Lease`."""
        self.step_tokens = step_tokens
        """Whether it is of a version that sends `StepTokens`."""
        self.pull_bytes_per_s = 0.0
        self.predictor = ""
        """Version of the predictor that it reports."""
        self.predictor_refused = ("", "")
        self.faults = Faults()
        self.port = free_port()
        self.control_address = ""
        """Where it says that its control channel is."""
        self.control_key: str | None = None
        """What the control channel asks for, from the next start on."""
        self.api_key: str | None = None
        """What generations, and `/v1/models`, must bring."""
        self.models: list[str] = []
        """Names of its model, as it describes itself; none as of an earlier version."""
        self.shape: dict[str, int] = {}
        self.adapters: list[str] = []
        """Names of its LoRA adapters, from the next start on."""
        self.configuration: dict[str, str] = {}
        """What it says to run with, from the next start on."""
        self.hold_at: int | None = None
        """Generate no further than this many tokens of prompt and output."""
        self.preempted: set[str] = set()
        """Keys of what waits for memory: neither steps nor can be cut."""
        self.predicts: Callable[[Request], tuple[float, float, float]] | None = None
        """Quantiles of what a request still generates, for the telemetry."""
        self.foretells = False
        self.forecast = ""  # what its predictor knows of requests that leave
        """Let a first prediction leave with each prefill: as many tokens as the prompt has."""
        self.asked: list[dict[str, Any]] = []
        self.asked_within: dict[str, str] = {}
        """The `traceparent` that each request came with, by key."""
        self.cuts: list[str] = []
        self.copies: list[str] = []
        self.released: list[str] = []
        self.freed: list[str] = []
        self.orphans: list[str] = []
        """What was freed because its gateway is gone; the mock engine waits a little for those who pull already."""
        self.pulled: list[str] = []
        self.aborted: list[str] = []
        self.peers: list[messages.Peer] = []
        self.mistakes: list[str] = []
        """What a real engine would answer with wrong tokens; `instances` checks that there is none."""
        self._server: SteeredServer | None = None
        self._http: aiohttp.ClientSession | None = None
        self._awake: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # --- life ---

    async def start(self) -> "FakeInstance":
        """Start, or start again after `die` with another boot and another control port."""
        identity = Identity(self.name, self.role, "127.0.0.1", self.port, free_port())
        # A connection a pull: one that was kept could belong to a source that has restarted since.
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))
        server = SteeredServer(self, identity, self._http)
        await server.start()
        self._server = server
        self.control_address = self.engine.control_address
        self._awake = asyncio.create_task(self._stay_awake(), name=f"engine {self.name}")
        return self

    async def die(self) -> None:
        """Lose everything at once: connections, KV, control channel."""
        if self._server is None or self._awake is None or self._http is None:
            return
        self._awake.cancel()
        self._server.stop()
        await self._http.close()
        self._server = self._awake = self._http = None
        await asyncio.sleep(0)

    async def _stay_awake(self) -> None:
        """Let the engine see what a test has changed, also where it has nothing to do."""
        while True:
            await asyncio.sleep(_IDLE_S)
            self.engine.wake()

    def reset_connections(self) -> None:
        """Break every open generation's connection."""
        for connection in list(self.connections):
            if connection.work is not None:
                connection.transport.abort()

    # --- what tests wait for and look at ---

    async def until(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        """Wait until something is true of this instance."""
        await eventually(condition, timeout_s)

    @property
    def engine(self) -> SteeredInstance:
        """The mock engine of its present life."""
        assert self._server is not None
        assert isinstance(self._server.instance, SteeredInstance)
        return self._server.instance

    @property
    def boot(self) -> str:
        return self.engine.boot

    @property
    def connections(self) -> set[Connection]:
        return self._server.connections if self._server is not None else set()

    @property
    def running(self) -> dict[str, Request]:
        """What has come and has not ended, by key."""
        requests = list(self.engine.requests.values()) if self._server is not None else []
        return {request.key: request for request in requests if request.key is not None}

    @property
    def pins(self) -> Pins:
        return self.engine.pins

    @property
    def pinned(self) -> list[str]:
        """Names of the pins: the key of a request, or what a `Copy` named."""
        return [str(pin.key) for pin in self.pins] if self._server is not None else []

    @property
    def quiet(self) -> bool:
        """Whether nothing generates and nothing is pinned."""
        return not self.running and not self.pinned

    def pin(self, name: str, tokens: list[int]) -> Pin:
        """Keep the KV of tokens until it is pulled or released."""
        pin = Pin(name, name, len(tokens), fold(tokens), -(-len(tokens) // BLOCK))
        self.engine.batch.free -= pin.blocks
        self.pins.add(pin)
        return pin

    def post(self, event: messages.Event) -> None:
        """Send something to every gateway."""
        self.engine.channel.post(event)


class SteeredServer(Server):
    """Answers for a fake: generations as its faults say, and its description as a test sets it."""

    def __init__(self, fake: FakeInstance, identity: Identity, http: aiohttp.ClientSession) -> None:
        puller = SteeredPuller(fake, http)
        super().__init__(identity, settings(fake), fake.model, puller)
        self.make = lambda: SteeredInstance(fake, identity, puller)
        self.fake = fake

    def connect(self) -> Connection:
        """Return what serves a new connection, with the faults of the fake."""
        return FaultyConnection(self, self.fake.faults, self._drop)

    def answer(self, request: HttpRequest, connection: Connection) -> None:
        """Answer a request."""
        fake = self.fake
        wants_key = fake.api_key is not None and request.path in (_GENERATE, _MODELS)
        if wants_key and request.authorization != f"Bearer {fake.api_key}".encode():
            raise HttpError(401, "Unauthorized")
        if request.path == _INSTANCE and self.instance is not None:
            boot, models, shape = self.instance.boot, list(fake.models), dict(fake.shape)
            description = messages.Description(
                fake.name, fake.role, boot, fake.control_address, models, shape, fake.adapters
            )
            connection.reply(description)
        elif request.path == _GENERATE:
            self._generate(request, connection)
        else:
            super().answer(request, connection)

    def disconnected(self, connection: Connection) -> None:
        """Note the request of a client that has gone, and abort it."""
        work = connection.work
        if isinstance(work, Request) and work.state != "finished":
            self.fake.aborted.append(str(work.key))
        super().disconnected(connection)

    def _generate(self, request: HttpRequest, connection: Connection) -> None:
        faults = self.fake.faults
        connection.work = request
        self.fake.asked.append(json.loads(request.body))
        self.fake.asked_within[self.fake.asked[-1].get("request_id", "")] = request.traceparent.decode()
        if faults.hang:
            return
        if faults.answer_after_s:
            loop = asyncio.get_running_loop()
            loop.call_later(faults.answer_after_s, self._begin_late, request, connection)
        else:
            self._begin(request, connection)

    def _begin(self, request: HttpRequest, connection: Connection) -> None:
        if self.fake.faults.refuse is not None:
            raise HttpError(self.fake.faults.refuse, f"{self.fake.name} refuses")
        super().answer(request, connection)

    def _begin_late(self, request: HttpRequest, connection: Connection) -> None:
        if connection.transport.is_closing():
            return
        try:
            self._begin(request, connection)
        except HttpError as error:
            connection.refuse(error)

    def _drop(self, request: Request) -> None:
        if self.instance is not None:
            self.instance.abort(request)


@contextlib.asynccontextmanager
async def instances(*roles: messages.Role, **settings: Any) -> Any:
    """Start one fake a role, named after role and number."""
    fakes: list[FakeInstance] = []
    try:
        for role in roles:
            number = sum(1 for other in fakes if other.role == role)
            fakes.append(await FakeInstance(f"{role}-{number}", role, **settings).start())
        yield fakes
        assert [mistake for fake in fakes for mistake in fake.mistakes] == []
    finally:
        for fake in fakes:
            await fake.die()
