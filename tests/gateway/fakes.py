"""A mock instance that tests steer: parts of `ares.mock_engine`, stepped as a test says, with faults at every point.

HTTP, requests, replies, tokens and pins are those of the mock engine. Only what a test needs to steer is written here:
the step loop, which can stop at a token, and the answers to commands, which can come late, wrong or not at all.
"""

import asyncio
import contextlib
import itertools
import json
import socket
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal

from ares.engine.control import ControlChannel, EngineCommand, GatewayDisconnected
from ares.mock_engine import api
from ares.mock_engine.http import Connection, HttpError, HttpRequest, handler, server_sent_event
from ares.mock_engine.model import MockModel, fold, unfold
from ares.mock_engine.pins import Pin, Pins
from ares.mock_engine.request import Cut, Request
from ares.mock_engine.settings import Identity
from ares.mock_engine.transfer import kv_transfer_params
from ares.protocol import fields, messages
from ares.protocol.keys import ControlKey

EOS = 2
FIRST_ORDINARY = 3
BLOCK = 16
_IDLE_S = 0.002
_TAIL = 64
# No lease ends within a test.
_LEASE_S = 3600.0


def mock_model(vocabulary: int) -> MockModel:
    """The model of the fakes: writes every token but the special ones."""
    return MockModel(tuple(range(FIRST_ORDINARY, vocabulary)), EOS, vocabulary)


def expected(prompt: list[int], count: int, *, vocabulary: int = 256, eos_at: int | None = None) -> list[int]:
    """What one undisturbed instance generates."""
    model = mock_model(vocabulary)
    before_eos = count if eos_at is None or eos_at < len(prompt) else eos_at - len(prompt)
    if before_eos >= count:
        return model.continuation(prompt, count)
    return [*model.continuation(prompt, before_eos), EOS]


async def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait until something is true that nothing announces."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.002)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Faults:
    """What goes wrong; changed at any time."""

    refuse: int | None = None
    """Answer generations with this HTTP status."""
    hang: bool = False
    """Accept the connection and never answer."""
    silent_stream: bool = False
    """Answer, and never send a token."""
    mute_after: int | None = None
    """Lose what a stream sends after so many tokens, also its end."""
    answer_after_s: float = 0.0
    """Answer a generation this late."""
    break_after: int | None = None
    """Reset the connection of a generation after so many of its tokens."""
    break_at_cut: bool = False
    """Reset the connection of a cut request instead of sending what its stream has not sent yet."""
    tail_after_s: float = 0.0
    """Deliver the end of a cut request's stream this late (then break it, if that is asked too)."""
    handover_after_s: float = 0.0
    """Answer a `Cut` or a `Copy` this late."""
    lose_handover: bool = False
    """Never answer a `Cut` or a `Copy`."""
    not_running: bool = False
    """Answer every `Cut` with `not_running`."""
    deaf: bool = False
    """Leave every command unread."""
    fail_pull: bool = False
    """Recompute instead of pulling."""
    error_in_stream: int | None = None
    """End a stream with this error after its first token."""
    abort: bool = False
    """End every running request as aborted, at its next step."""
    repeats: bool = False
    """Find that the output repeats itself, where a request is cut or prefilled."""


class FakeInstance:
    """One instance. `cluster` is shared by all that may pull from each other."""

    def __init__(
        self,
        name: str,
        role: messages.Role,
        cluster: dict[str, "FakeInstance"],
        *,
        step_s: float = 0.002,
        vocabulary: int = 256,
        eos_at: int | None = None,
        kv_blocks: int = 1000,
        max_model_len: int = 4096,
        prefix_caching: bool = True,
        carries: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.role = role
        self.cluster = cluster
        self.step_s = step_s
        self.model = mock_model(vocabulary)
        self.eos_at = eos_at
        """Tokens of prompt and output after which the stop token comes."""
        self.kv_blocks = kv_blocks
        self.max_model_len = max_model_len
        self.prefix_caching = prefix_caching
        self.carries = carries
        """What it says to restore, from the next start on."""
        self.leases = True
        """Whether it is of a version that answers a `Lease`."""
        self.pull_bytes_per_s = 0.0
        self.left_to_decode = 0
        """Tokens at the end of a prompt that it leaves to the decode instance, as of models with states."""
        self.faults = Faults()
        self.port = free_port()
        self.boot = ""
        self.control_key: str | None = None
        """What the control channel asks for, from the next start on."""
        self.api_key: str | None = None
        """What generations, and `/v1/models`, must bring."""
        self.models: list[str] = []
        """Names of its model, as it describes itself; none as of an earlier version."""
        self.shape: dict[str, int] = {}
        self.hold_at: int | None = None
        """Generate no further than this many tokens of prompt and output."""
        self.asked: list[dict[str, Any]] = []
        self.preempted: set[str] = set()
        """Keys of what waits for memory: neither steps nor can be cut."""
        self.cuts: list[str] = []
        self.copies: list[str] = []
        self.released: list[str] = []
        self.freed: list[str] = []
        self.orphans: list[str] = []
        """What was freed because its gateway is gone; a real instance waits a little for those who pull already."""
        self.pulled: list[str] = []
        self.aborted: list[str] = []
        self.peers: list[messages.Peer] = []
        self.mistakes: list[str] = []
        """What a real engine would answer with wrong tokens; the fixtures check that there is none."""
        self.pins = Pins(_LEASE_S, lambda _: None)
        self.running: dict[str, Request] = {}
        self.predicts: Callable[[Request], tuple[float, float, float]] | None = None
        """Quantiles of what a request still generates, for the telemetry."""
        self.foretells = False
        """Let a first prediction leave with each prefill: as many tokens as the prompt has."""
        self.steps = 0
        self.connections: set[Connection] = set()
        self._muted: set[Request] = set()
        self._ignoring_eos: set[Request] = set()
        self._changed = asyncio.Event()
        self._sequence = itertools.count(1)
        self._task: asyncio.Task[None] | None = None
        self._later: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._channel: ControlChannel | None = None
        self._routes = {
            (b"POST", b"/inference/v1/generate"): self._generate,
            (b"GET", b"/ares/v1/instance"): self._describe,
            (b"GET", b"/v1/models"): self._list,
            (b"GET", b"/health"): self._health,
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # --- life ---

    async def start(self) -> "FakeInstance":
        """Start, or start again after `die` with another boot and another control port."""
        self.boot = uuid.uuid4().hex
        self.cluster[self.boot] = self
        self.control_address = f"tcp://127.0.0.1:{free_port()}"
        peer = messages.Peer(engine_id=self.boot, host="127.0.0.1", port=1)
        hello = messages.Hello(
            self.name,
            self.role,
            self.boot,
            peer,
            BLOCK,
            self.kv_blocks,
            self.max_model_len,
            {"vllm": "fake"},
            token_bytes=1000.0,
            pull_within_step_bytes=1_000_000,
            prefix_caching=self.prefix_caching,
            carries=list(self.carries),
            leases=self.leases,
        )
        key = ControlKey(self.control_key) if self.control_key is not None else None
        self._channel = ControlChannel(self.control_address, hello, self._snapshot, key=key)
        self._server = await asyncio.get_running_loop().create_server(lambda: Connection(self), "127.0.0.1", self.port)
        self._task = asyncio.create_task(self._engine(), name=f"engine {self.name}")
        return self

    async def die(self) -> None:
        """Lose everything at once: connections, KV, control channel."""
        if self._server is None or self._task is None or self._channel is None:
            return
        self._server.close()
        for task in (self._task, *self._later):
            task.cancel()
        await asyncio.gather(self._task, *self._later, return_exceptions=True)
        self._channel.close()
        for connection in list(self.connections):
            connection.work = None
            connection.transport.abort()
        self._server = self._task = self._channel = None
        self.running.clear()
        self.pins.clear()
        self.cluster.pop(self.boot, None)
        await asyncio.sleep(0)

    def reset_connections(self) -> None:
        """Break every open generation's connection."""
        for connection in list(self.connections):
            if connection.work is not None:
                connection.transport.abort()

    # --- what tests wait for ---

    async def until(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        """Wait until something is true of this instance."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def pinned(self) -> list[str]:
        """Names of the pins: the key of a request, or what a `Copy` named."""
        return [pin.id for pin in self.pins]

    @property
    def quiet(self) -> bool:
        """Whether nothing generates and nothing is pinned."""
        return not self.running and not self.pinned

    def pin(self, name: str, tokens: list[int]) -> Pin:
        """Keep the KV of tokens until it is pulled or released."""
        pin = Pin(name, name, len(tokens), fold(tokens), -(-len(tokens) // BLOCK))
        self.pins.add(pin)
        return pin

    def post(self, event: messages.Event) -> None:
        """Send something to every gateway."""
        assert self._channel is not None
        self._channel.post(event)

    # --- what a connection asks of its service ---

    def answer(self, request: HttpRequest, connection: Connection) -> None:
        handler(self._routes, request)(request, connection)

    def caught_up(self, connection: Connection) -> None:
        """Streams here are written whether they are read or not."""

    def disconnected(self, connection: Connection) -> None:
        work = connection.work
        if isinstance(work, Request) and self.running.pop(str(work.key), None) is not None:
            self.aborted.append(str(work.key))
            if work.cut is not None:
                self._answer(work, "finished")
            self._tell()

    def _describe(self, _: HttpRequest, connection: Connection) -> None:
        models, shape = list(self.models), dict(self.shape)
        connection.reply(messages.Description(self.name, self.role, self.boot, self.control_address, models, shape))

    def _list(self, request: HttpRequest, connection: Connection) -> None:
        self._authorize(request)
        connection.reply({"object": "list", "data": []})

    def _health(self, _: HttpRequest, connection: Connection) -> None:
        connection.reply({})

    def _authorize(self, request: HttpRequest) -> None:
        if self.api_key is not None and request.authorization != f"Bearer {self.api_key}".encode():
            raise HttpError(401, "Unauthorized")

    def _generate(self, request: HttpRequest, connection: Connection) -> None:
        self._authorize(request)
        connection.work = request
        self.asked.append(json.loads(request.body))
        self._tell()
        if self.faults.hang:
            return
        if self.faults.answer_after_s:
            self._schedule(self._begin_late(request.body, connection))
        else:
            self.begin(request.body, connection)

    async def _begin_late(self, body: bytes, connection: Connection) -> None:
        await asyncio.sleep(self.faults.answer_after_s)
        if not connection.transport.is_closing():
            try:
                self.begin(body, connection)
            except HttpError as error:
                connection.refuse(error)

    def begin(self, body: bytes, connection: Connection) -> Request:
        """Take a generation; HttpError refuses it."""
        if self.faults.refuse is not None:
            raise HttpError(self.faults.refuse, f"{self.name} refuses")
        request = api.read(body, self.model, self.max_model_len, connection)
        connection.work = request
        request.key = key = request.key or request.id
        if json.loads(body)["sampling_params"].get("ignore_eos"):
            self._ignoring_eos.add(request)
        if request.stream:
            connection.begin()
        pulls, pulled = request.source is not None, self._pull(request)
        if self._channel is not None:
            self._channel.post(messages.KvReceived(key, pulled, pulls and not pulled))
            if request.remote_decode and self.foretells:
                self._channel.post(messages.Predicted(key, (1.0, float(request.length), 1000.0)))
        self.running[key] = request
        self._tell()
        return request

    def _pull(self, request: Request) -> int:
        """Take the KV that a request names from its source; return the tokens of it, 0 where all is recomputed."""
        if request.source is None:
            return 0
        self.pulled.append(str(request.key))
        source = self.cluster.get(request.source["remote_engine_id"])
        pin = source.pins.find(request.source["remote_request_id"]) if source is not None else None
        if source is None or pin is None:
            return 0
        source.pins.pulled(pin)
        source.freed.append(pin.id)
        source._tell()
        if self.faults.fail_pull:
            return 0
        if fold(request.prompt[: pin.tokens]) != pin.hash:
            self.mistakes.append(f"{request.key} pulled the KV of other tokens")
        return pin.tokens

    # --- the engine ---

    async def _engine(self) -> None:
        while True:
            await asyncio.sleep(self.step_s if self.running else _IDLE_S)
            if self._channel is not None and self._channel.waiting and not self.faults.deaf:
                for sender, command in self._channel.commands():
                    self._carry_out(sender, command)
            if not self.faults.silent_stream:
                self.steps += bool(self.running)
                for request in list(self.running.values()):
                    self._step(request)
            self._tell()

    def _samples(self, request: Request) -> bool:
        held = self.hold_at is not None and request.length >= self.hold_at
        return not held and request.key not in self.preempted

    def _step(self, request: Request) -> None:
        """Give a request its next token, where nothing holds it back."""
        if self.faults.abort:
            self._finish(request, "abort", [])
            return
        if not self._samples(request) and request.cut is None:
            return
        stops = request.length == self.eos_at and request not in self._ignoring_eos
        token = EOS if stops else self.model.next_token(request.hash)
        request.hash = fold([token], request.hash)
        request.output.append(token)
        request.length += 1
        if stops:
            self._finish(request, "stop", [token])
        elif len(request.output) >= request.end:
            self._finish(request, "length", [token])
        elif self.faults.break_after is not None and len(request.output) >= self.faults.break_after:
            del self.running[str(request.key)]
            request.connection.transport.abort()
        else:
            self._send(request, api.event(request, [token]))
            if self.faults.error_in_stream is not None:
                del self.running[str(request.key)]
                error = {"message": "the engine failed", "code": self.faults.error_in_stream}
                self._send(request, server_sent_event({"error": error}))
                request.connection.end(api.DONE)

    def _send(self, request: Request, data: bytes) -> bool:
        """Write a part of a stream, unless that is lost; return whether it was written."""
        if self.faults.mute_after is not None and len(request.output) > self.faults.mute_after:
            self._muted.add(request)
        if request in self._muted or not request.stream:
            return False
        request.connection.transport.write(data)
        return True

    def _finish(self, request: Request, reason: str, last: list[int]) -> None:
        key, cut = str(request.key), request.cut
        del self.running[key]
        transfer, stop = None, None
        ended = reason == "length" or (self.left_to_decode and request.remote_decode)
        goes_on = ended and not request.unwanted and (cut is not None or request.remote_decode)
        if goes_on and self.faults.repeats:
            # The reason is vLLM's for the limit of a cut (engine/connector/scheduler.py).
            stop = fields.REPETITION_DETECTED
        elif goes_on:
            if cut is not None:
                # The newest token's KV is not computed yet.
                hash_, tokens = unfold(request.hash, request.output[-1]), request.length - 1
                pin = Pin(key, key, tokens, hash_, -(-tokens // BLOCK))
                self.pins.add(pin)
                stop = fields.MIGRATED
            else:
                pin = self.pin(key, request.prompt[: len(request.prompt) - self.left_to_decode])
            transfer = self._transfer(pin)
            if cut is None and self.left_to_decode:
                transfer[fields.PROMPT_SHORTENED] = True
        if cut is not None:
            self._answer(request, "pinned" if transfer is not None else "finished", transfer)
        if cut is not None and self.faults.tail_after_s:
            self._schedule(self._end_late(request, last, reason, stop, transfer))
        else:
            self._end(request, last, reason, stop, transfer)

    async def _end_late(self, request: Request, *ending: Any) -> None:
        await asyncio.sleep(self.faults.tail_after_s)
        if not request.connection.transport.is_closing():
            self._end(request, *ending)

    def _end(
        self, request: Request, last: list[int], reason: str, stop: str | None, transfer: dict[str, Any] | None
    ) -> None:
        connection = request.connection
        if request.cut is not None and self.faults.break_at_cut:
            connection.transport.abort()
        elif not request.stream:
            connection.reply(api.whole(request, "some/model", reason, stop, transfer))
        elif self._send(request, api.event(request, last, reason, stop)):
            connection.end(api.DONE)

    # --- the control channel ---

    def _carry_out(self, sender: bytes, command: EngineCommand) -> None:
        match command:
            case messages.Cut(key=key):
                self.cuts.append(key)
                self._cut(sender, command)
            case messages.Copy(key=key):
                self.copies.append(key)
                self._copy(sender, command)
            case messages.Release(key=key):
                self.released.append(key)
                if self.pins.release(key):
                    self.freed.append(key)
                elif key in self.running:
                    self.running[key].unwanted = True
            case messages.Connect(peers=peers):
                self.peers += peers
            case GatewayDisconnected(gateway=gateway):
                for key in [key for key in self.pinned if messages.owner(key) == gateway]:
                    self.pins.release(key)
                    self.orphans.append(key)

    def _cut(self, sender: bytes, command: messages.Cut) -> None:
        request = self.running.get(command.key)
        if request is None:
            self._post(messages.CutResult(command.call, command.key, "unknown"), sender)
        elif self.faults.not_running or request.cut is not None or command.key in self.preempted:
            self._post(messages.CutResult(command.call, command.key, "not_running"), sender)
        else:
            request.cut = Cut(sender, command.call)
            limit = len(request.output) + 1
            if limit < request.end:
                request.limit(limit)
            else:
                request.unwanted = True

    def _copy(self, sender: bytes, command: messages.Copy) -> None:
        request = self.running.get(command.key)
        count = min(request.length - 1, command.most) // BLOCK * BLOCK if request is not None else 0
        if request is None or not count:
            self._post(messages.CopyResult(command.call, command.pin), sender)
            return
        pin = self.pin(command.pin, (request.prompt + request.output)[:count])
        self._post(messages.CopyResult(command.call, command.pin, count, self._transfer(pin)), sender)

    def _transfer(self, pin: Pin) -> dict[str, Any]:
        return kv_transfer_params(Identity(self.name, self.role, "127.0.0.1", self.port, 1), self.boot, pin)

    def _answer(
        self, request: Request, outcome: Literal["pinned", "finished"], transfer: dict[str, Any] | None = None
    ) -> None:
        """Answer the `Cut` of a request."""
        assert request.cut is not None
        output, key = request.output, str(request.key)
        result = messages.CutResult(
            request.cut.call,
            key,
            outcome,
            len(output),
            output[-_TAIL:],
            transfer or {},  # type: ignore[arg-type]
        )
        self._post(result, request.cut.sender)

    def _post(self, event: messages.Event, receiver: bytes) -> None:
        async def later() -> None:
            await asyncio.sleep(self.faults.handover_after_s)
            if self._channel is not None:
                self._channel.post(event, receiver)

        if self.faults.lose_handover:
            return
        if self.faults.handover_after_s:
            self._schedule(later())
        elif self._channel is not None:
            self._channel.post(event, receiver)

    def _snapshot(self) -> messages.Telemetry:
        requests = list(self.running.items())
        rows = [
            messages.Row(
                key,
                0 if key in self.preempted else request.length,
                len(request.output),
                "waiting" if key in self.preempted else "running",
                self.predicts(request) if self.predicts is not None else None,
            )
            for key, request in requests
        ]
        resident = sum(row.resident for row in rows)
        return messages.Telemetry(
            sequence=next(self._sequence),
            kv_blocks_used=-(-resident // BLOCK) + sum(pin.blocks for pin in self.pins),
            running=len(rows),
            waiting=0,
            pinned=len(self.pins),
            step_time_s=self.step_s,
            steps=self.steps,
            preemptions=0,
            rows=rows,
            busy_s=self.steps * self.step_s,
            pull_bytes_per_s=self.pull_bytes_per_s,
        )

    def _schedule(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)


@contextlib.asynccontextmanager
async def instances(*roles: messages.Role, **settings: Any) -> Any:
    """Start one fake a role, named after role and number, all in one cluster."""
    cluster: dict[str, FakeInstance] = {}
    fakes: list[FakeInstance] = []
    try:
        for role in roles:
            number = sum(1 for other in fakes if other.role == role)
            fakes.append(await FakeInstance(f"{role}-{number}", role, cluster, **settings).start())
        yield fakes
        assert [mistake for fake in fakes for mistake in fake.mistakes] == []
    finally:
        for fake in fakes:
            await fake.die()
