"""A stand-in for a vLLM instance: its HTTP API and control channel, a deterministic model, and faults on demand."""

import asyncio
import contextlib
import itertools
import json
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from ares.engine.control import ControlChannel, EngineCommand, GatewayDisconnected
from ares.protocol import messages
from ares.protocol.keys import ControlKey

EOS = 2
FIRST_ORDINARY = 3
KEY = "ares_key"
MIGRATED = "migrated"
BLOCK = 16
_IDLE_S = 0.002
_TAIL = 64


def next_token(tokens: list[int], vocabulary: int) -> int:
    """The model: depends on every token before, so a lost, doubled or swapped token changes all that follow."""
    state = 17
    for token in tokens:
        state = (state * 31 + token + 7) % 1_000_003
    return FIRST_ORDINARY + state % (vocabulary - FIRST_ORDINARY)


def expected(prompt: list[int], count: int, *, vocabulary: int = 256, eos_at: int | None = None) -> list[int]:
    """What one undisturbed instance generates."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < count:
        if len(tokens) == eos_at:
            tokens.append(EOS)
            break
        tokens.append(next_token(tokens, vocabulary))
    return tokens[len(prompt) :]


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
    """Send a `Handover` this late."""
    lose_handover: bool = False
    """Never send a `Handover`."""
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


@dataclass(slots=True)
class Work:
    """One request on the fake."""

    key: str
    tokens: list[int]
    prompt_tokens: int
    maximum: int
    parameters: dict[str, Any]
    params: dict[str, Any]
    lines: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    finish_reason: str | None = None
    stop_reason: str | None = None
    transfer: dict[str, Any] | None = None
    cut: tuple[bytes, messages.Cut] | None = None
    unwanted: bool = False
    reset: bool = False

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]


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
        self.vocabulary = vocabulary
        self.eos_at = eos_at
        self.kv_blocks = kv_blocks
        self.max_model_len = max_model_len
        self.prefix_caching = prefix_caching
        self.carries = carries
        """What it says to restore, from the next start on."""
        self.leases = True
        """Whether it is of a version that answers a `Lease`."""
        self.pull_bytes_per_s = 0.0
        self.faults = Faults()
        self.port = free_port()
        self.boot = ""
        self.control_key: str | None = None
        """What the control channel asks for, from the next start on."""
        self.api_key: str | None = None
        """What generations, and `/v1/models`, must bring."""
        self.models: list[str] = []
        """Names of its model, as it says them; none as of an earlier version."""
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
        self.pinned: dict[str, list[int]] = {}
        self.running: dict[str, Work] = {}
        self.changed = asyncio.Condition()
        self.predicts: Callable[[Work], tuple[float, float, float]] | None = None
        """Quantiles of what a request still generates, for the telemetry."""
        self.foretells = False
        """Let a first prediction leave with each prefill: as many tokens as the prompt has."""
        self.steps = 0
        self._sequence = itertools.count(1)
        self._open: dict[int, web.Request] = {}
        self._task: asyncio.Task[None] | None = None
        self._later: set[asyncio.Task[None]] = set()
        self._runner: web.AppRunner | None = None
        self._channel: ControlChannel | None = None

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
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_get("/ares/v1/instance", self._describe)
        app.router.add_get("/v1/models", self._list)
        app.router.add_get("/health", self._health)
        # handler_cancellation: a client that leaves is an abort, as in vLLM.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self._task = asyncio.create_task(self._engine(), name=f"engine {self.name}")
        return self

    async def die(self) -> None:
        """Lose everything at once: connections, KV, control channel."""
        if self._runner is None or self._task is None or self._channel is None:
            return
        for task in (self._task, *self._later):
            task.cancel()
        await asyncio.gather(self._task, *self._later, return_exceptions=True)
        self.reset_connections()
        self._channel.close()
        await self._runner.cleanup()
        self._runner = self._task = self._channel = None
        self.running.clear()
        self.pinned.clear()
        self.cluster.pop(self.boot, None)

    def reset_connections(self) -> None:
        """Break every open generation's connection."""
        for request in list(self._open.values()):
            if request.transport is not None:
                request.transport.abort()

    # --- what tests wait for ---

    async def until(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        """Wait until something is true of this instance."""
        async with asyncio.timeout(timeout_s), self.changed:
            await self.changed.wait_for(condition)

    @property
    def quiet(self) -> bool:
        """Whether nothing generates and nothing is pinned."""
        return not self.running and not self.pinned

    # --- HTTP ---

    async def _describe(self, _: web.Request) -> web.Response:
        told = messages.Description(
            self.name, self.role, self.boot, self.control_address, list(self.models), dict(self.shape)
        )
        return web.json_response(msgspec.to_builtins(told))

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": []}, status=200 if self._lets_in(request) else 401)

    def _lets_in(self, request: web.Request) -> bool:
        return self.api_key is None or request.headers.get("Authorization") == f"Bearer {self.api_key}"

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if not self._lets_in(request):
            return web.json_response({"error": "Unauthorized"}, status=401)
        self._open[id(request)] = request
        try:
            return await self._serve(request, await request.json())
        finally:
            self._open.pop(id(request), None)

    async def _serve(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.asked.append(body)
        await self._tell()
        if self.faults.hang:
            await asyncio.Event().wait()
        if self.faults.answer_after_s:
            await asyncio.sleep(self.faults.answer_after_s)
        if self.faults.refuse is not None:
            text = json.dumps({"error": {"message": f"{self.name} refuses", "code": self.faults.refuse}})
            return web.Response(status=self.faults.refuse, text=text, content_type="application/json")
        if body["sampling_params"]["max_tokens"] < 1 or not body["token_ids"]:
            return web.json_response({"error": {"message": "max_tokens must be at least 1"}}, status=400)
        work = self._admit(body)
        try:
            if body.get("stream"):
                return await self._stream(request, work)
            await work.finished.wait()
        except (asyncio.CancelledError, ConnectionResetError):
            await self._abort(work)
            raise
        choice = {
            "index": 0,
            "token_ids": work.output,
            "logprobs": self._logprobs(work, work.output),
            "finish_reason": work.finish_reason,
        }
        return web.json_response({"request_id": work.key, "choices": [choice], "kv_transfer_params": work.transfer})

    async def _stream(self, request: web.Request, work: Work) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for count in itertools.count():
            line = await work.lines.get()
            if self.faults.mute_after is not None and count >= self.faults.mute_after:
                await asyncio.Event().wait()
            if line is None:
                break
            await response.write(line)
        if work.reset:
            if request.transport is not None:
                request.transport.abort()
            await asyncio.sleep(1)  # the handler is cancelled by the lost connection
        await response.write(b"data: [DONE]\n\n")
        return response

    def _admit(self, body: dict[str, Any]) -> Work:
        params, tokens = dict(body.get("kv_transfer_params") or {}), list(body["token_ids"])
        sampling = body["sampling_params"]
        work = Work(params.get(KEY, uuid.uuid4().hex), tokens, len(tokens), sampling["max_tokens"], sampling, params)
        pulled = 0
        if params.get("do_remote_prefill"):
            source = self.cluster.get(params["remote_engine_id"])
            held = source.pinned.pop(params["remote_request_id"], None) if source is not None else None
            if source is not None and held is not None:
                source.freed.append(params["remote_request_id"])
                source._schedule(source._tell())
                if not self.faults.fail_pull:
                    if tokens[: len(held)] != held:
                        self.mistakes.append(f"{work.key} pulled the KV of other tokens")
                    pulled = len(held)
            self.pulled.append(work.key)
        if self._channel is not None:
            failed = bool(params.get("do_remote_prefill")) and not pulled
            self._channel.post(messages.KvReceived(work.key, pulled, failed))
            if params.get("do_remote_decode") and self.foretells:
                self._channel.post(messages.Predicted(work.key, (1.0, float(len(tokens)), 1000.0)))
        self.running[work.key] = work
        return work

    def post(self, event: messages.Event) -> None:
        """Tell every gateway something."""
        assert self._channel is not None
        self._channel.post(event)

    async def _abort(self, work: Work) -> None:
        if self.running.pop(work.key, None) is not None:
            self.aborted.append(work.key)
            if work.cut is not None:
                self._answer(work, "finished")
            await self._tell()

    # --- the engine ---

    async def _engine(self) -> None:
        while True:
            await asyncio.sleep(self.step_s if self.running else _IDLE_S)
            if self._channel is not None and self._channel.waiting and not self.faults.deaf:
                for sender, command in self._channel.commands():
                    self._carry_out(sender, command)
            if not self.faults.silent_stream:
                self.steps += bool(self.running)
                for work in list(self.running.values()):
                    self._step(work)
            await self._tell()

    def _samples(self, work: Work) -> bool:
        held = self.hold_at is not None and len(work.tokens) >= self.hold_at
        return not held and work.key not in self.preempted

    def _step(self, work: Work) -> None:
        if self.faults.abort:
            self._finish(work, "abort", [])
            return
        if not self._samples(work) and work.cut is None:
            return
        if len(work.tokens) == self.eos_at and not work.parameters.get("ignore_eos"):
            token = EOS
        else:
            token = next_token(work.tokens, self.vocabulary)
        work.tokens.append(token)
        if token == EOS:
            self._finish(work, "stop", [token])
        elif len(work.output) >= work.maximum:
            self._finish(work, "length", [token])
        elif self.faults.break_after is not None and len(work.output) >= self.faults.break_after:
            self.running.pop(work.key)
            work.reset = True
            work.lines.put_nowait(None)
        else:
            work.lines.put_nowait(self._chunk(work, [token]))
            if self.faults.error_in_stream is not None:
                self.running.pop(work.key)
                error = {"error": {"message": "the engine failed", "code": self.faults.error_in_stream}}
                work.lines.put_nowait(b"data: " + msgspec.json.encode(error) + b"\n\n")
                work.lines.put_nowait(None)

    def _finish(self, work: Work, reason: str, last: list[int]) -> None:
        self.running.pop(work.key)
        work.finish_reason = reason
        pin = reason == "length" and not work.unwanted
        if pin and (work.cut is not None or work.params.get("do_remote_decode")):
            # The newest token's KV is not computed yet.
            self.pinned[work.key] = work.tokens[:-1] if work.cut is not None else work.tokens[: work.prompt_tokens]
            work.transfer = self._transfer(work.key)
        tail = [self._chunk(work, last)]
        if work.cut is not None:
            if work.transfer is not None:
                work.stop_reason = MIGRATED
                tail = [self._chunk(work, last)]
            self._answer(work, "pinned" if work.transfer is not None else "finished")
            if self.faults.break_at_cut:
                tail, work.reset = [], True
        self._schedule(self._deliver(work, tail))

    async def _deliver(self, work: Work, tail: list[bytes]) -> None:
        if work.cut is not None and self.faults.tail_after_s:
            await asyncio.sleep(self.faults.tail_after_s)
        for line in tail:
            work.lines.put_nowait(line)
        work.lines.put_nowait(None)
        work.finished.set()

    def _logprobs(self, work: Work, tokens: list[int]) -> dict[str, Any] | None:
        asked = work.parameters.get("logprobs")
        if asked is None:
            return None
        candidates = [{"token_id": FIRST_ORDINARY + n, "logprob": -1.0 - n} for n in range(asked)]
        return {
            "content": [
                {
                    "token_id": token,
                    "logprob": -0.5,
                    "top_logprobs": [{"token_id": token, "logprob": -0.5}, *candidates],
                }
                for token in tokens
            ]
        }

    def _chunk(self, work: Work, tokens: list[int]) -> bytes:
        choice = {
            "index": 0,
            "token_ids": tokens,
            "logprobs": self._logprobs(work, tokens),
            "finish_reason": work.finish_reason,
            "stop_reason": work.stop_reason,
        }
        return b"data: " + msgspec.json.encode({"request_id": work.key, "choices": [choice]}) + b"\n\n"

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
                if self.pinned.pop(key, None) is not None:
                    self.freed.append(key)
                elif key in self.running:
                    self.running[key].unwanted = True
            case messages.Connect(peers=peers):
                self.peers += peers
            case GatewayDisconnected(gateway=gateway):
                for key in [key for key in self.pinned if messages.owner(key) == gateway]:
                    del self.pinned[key]
                    self.orphans.append(key)

    def _cut(self, sender: bytes, command: messages.Cut) -> None:
        work = self.running.get(command.key)
        if work is None:
            self._post(messages.CutResult(command.call, command.key, "unknown"), sender)
        elif self.faults.not_running or work.cut is not None or command.key in self.preempted:
            self._post(messages.CutResult(command.call, command.key, "not_running"), sender)
        else:
            work.cut = (sender, command)
            limit = len(work.output) + 1
            if limit < work.maximum:
                work.maximum = limit
            else:
                work.unwanted = True

    def _copy(self, sender: bytes, command: messages.Copy) -> None:
        work = self.running.get(command.key)
        count = min(len(work.tokens) - 1, command.most) // BLOCK * BLOCK if work is not None else 0
        if work is None or not count:
            self._post(messages.CopyResult(command.call, command.pin), sender)
            return
        self.pinned[command.pin] = work.tokens[:count]
        self._post(messages.CopyResult(command.call, command.pin, count, self._transfer(command.pin)), sender)

    def _transfer(self, pin: str) -> dict[str, Any]:
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.boot,
            "remote_request_id": pin,
            "remote_num_tokens": len(self.pinned[pin]),
        }

    def _answer(self, work: Work, outcome: str) -> None:
        assert work.cut is not None
        sender, command = work.cut
        output = work.output
        event = messages.CutResult(
            command.call,
            work.key,
            outcome,
            len(output),
            output[-_TAIL:],
            work.transfer or {},  # type: ignore[arg-type]
        )
        self._post(event, sender)

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
        rows = [
            messages.Row(
                work.key,
                0 if work.key in self.preempted else len(work.tokens),
                len(work.tokens) - work.prompt_tokens,
                "waiting" if work.key in self.preempted else "running",
                self.predicts(work) if self.predicts is not None else None,
            )
            for work in list(self.running.values())
        ]
        held = sum(row.resident for row in rows) + sum(map(len, list(self.pinned.values())))
        return messages.Telemetry(
            sequence=next(self._sequence),
            kv_blocks_used=-(-held // BLOCK),
            running=len(rows),
            waiting=0,
            pinned=len(self.pinned),
            step_time_s=self.step_s,
            steps=self.steps,
            preemptions=0,
            rows=rows,
            busy_s=self.steps * self.step_s,
            pull_bytes_per_s=self.pull_bytes_per_s,
        )

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def _schedule(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
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
