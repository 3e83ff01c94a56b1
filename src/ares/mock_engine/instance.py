"""One mock instance: requests in, tokens out at the pace of the step-time model, cuts and pins as on a real engine.

One timer per instance ends a step, writes that step's tokens, and begins the next. Commands are carried out when
a step has been scheduled, as in engine/connector/scheduler.py, or at once where nothing runs.
"""

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import Callable
from typing import Any

from ares.engine.connector.step_times import StepTimes
from ares.engine.control import ControlChannel, GatewayDisconnected, GatewayExpired
from ares.engine.identity import control_address, control_key
from ares.mock_engine import api, report
from ares.mock_engine.batch import Batch, Step
from ares.mock_engine.faults import FaultState
from ares.mock_engine.http import Connection
from ares.mock_engine.model import MockModel, unfold
from ares.mock_engine.pins import Pin, Pins
from ares.mock_engine.predictor import MockPredictor
from ares.mock_engine.prefix_cache import PrefixCache
from ares.mock_engine.request import Cut, Request
from ares.mock_engine.settings import EngineSettings, Identity
from ares.mock_engine.transfer import Puller, PullError, kv_transfer_params, transfer_s
from ares.mock_engine.writer import Writer
from ares.protocol import fields, messages

# A step that begins this late begins then, and the lag is counted; a shorter delay is caught up.
_SLACK_S = 0.02
# How many times per lease a waiting request renews the lease of the KV that it will pull.
_EXTENSIONS = 6


class Instance:
    """One instance from its start to its end.

    Attributes
    ----------
    boot
        Its engine id; another one after every restart.
    requests
        Requests that arrived and have not ended, by `Request.name`.
    counters
        Counts since the start, for `/simulate/counters`.
    channel
        Its end of the control channel.
    """

    def __init__(self, identity: Identity, settings: EngineSettings, model: MockModel, puller: Puller) -> None:
        self.identity = identity
        self.settings = settings
        self.model = model
        self.boot = uuid.uuid4().hex
        self.faults = FaultState()
        self.predictor = MockPredictor(settings.prediction_error)
        self.prefix_cache = PrefixCache(settings.kv_blocks * settings.prefix_caching, settings.profile.block_size)
        self.batch = self.make_batch(self._pull)
        self.pins = Pins(settings.lease_s, self._free)
        self.requests: dict[str, Request] = {}
        self.counters = report.Counters()
        self.step_times = StepTimes()
        self._by_key: dict[str, Request] = {}
        self._puller = puller
        self._numbers = itertools.count(1)
        self._loop = asyncio.get_running_loop()
        self._writer = Writer(model, self.finish)
        self._step: Step | None = None
        # Set while a step runs or is about to be scheduled, so that there is never a second chain of steps.
        self._timer: asyncio.Handle | None = None
        self._woken = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.channel = self.open_channel(self._notify)
        self._spawn(self._extend_leases())

    def make_batch(self, pull: Callable[[Request], None]) -> Batch:
        """Return its batch, which calls `pull` for KV that is elsewhere; a subclass may schedule otherwise."""
        return Batch(
            self.settings.profile,
            self.settings.kv_blocks,
            self.settings.policy,
            pull,
            lambda request: self.prefix_cache.cached(request.prompt + request.output, request.salt),
        )

    def open_channel(self, notify: Callable[[], None]) -> ControlChannel:
        """Open the control channel, which calls `notify` when a command waits; a subclass may open another kind."""
        source = report.TelemetrySource(self)
        endpoint = control_address(self.identity.host, self.identity.control_port)
        return ControlChannel(
            endpoint,
            report.hello(self),
            source,
            notify=notify,
            key=control_key(),
            kv_events=self.prefix_cache.log,
        )

    @property
    def control_address(self) -> str:
        """Where gateways reach its control channel."""
        return control_address(self.identity.published_host, self.identity.control_port)

    @property
    def role(self) -> messages.Role:
        """Its role now."""
        return self.channel.role

    @property
    def draining(self) -> bool:
        """Whether it tells every gateway that it takes no new requests."""
        return self.channel.draining

    def drain(self, deadline_s: float) -> None:
        """Tell every gateway that it takes no new requests, and by when the running ones have to leave."""
        self.channel.drain(True, deadline_s)

    @property
    def left(self) -> int:
        """Number of requests that have not ended, and of pins that have not been pulled."""
        return len(self.requests) + len(self.pins)

    def close(self) -> None:
        """End all at once: requests, KV, control channel."""
        self.faults.thaw()
        for task in self._tasks:
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self.pins.clear()
        self.channel.close()
        self.prefix_cache.close()

    # --- requests ---

    def add(self, body: bytes, connection: Connection) -> None:
        """Take a request; HttpError refuses it."""
        request = api.read(body, self.model, self.settings.max_model_len, connection)
        connection.work = request
        request.arrival = next(self._numbers)
        self.counters.arrived += 1
        name = f"{request.id}-{request.arrival}"
        request.name = name
        self.requests[name] = request
        if request.key is not None:
            self._by_key[request.key] = request
        if request.stream:
            api.prepare(request)
            connection.begin()
        if delay := self.settings.profile.start_delay_s:
            self._loop.call_later(delay / self.settings.speed, self._enqueue, request)
        else:
            self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        if request.state == "arriving":
            self.batch.add(request)
            self.wake()

    def abort(self, request: Request) -> None:
        """End the request of a client that has disconnected."""
        if request.state == "finished":
            return
        self.counters.aborted += 1
        if request.source is not None and request.state != "loading":
            # No other instance will free the KV that it was to pull.
            self._spawn(self._discard(request.source))
        loading = request.state == "loading"
        if loading:
            # A running transfer continues to its end, and its blocks stay allocated until then.
            request.state = "finished"
            self._forget(request)
        else:
            self._free(self._remove(request))
        if request.cut is not None:
            self._answer(request, None)

    def _remove(self, request: Request) -> int:
        self._forget(request)
        return self.batch.remove(request)

    def _forget(self, request: Request) -> None:
        del self.requests[request.name]
        if request.key is not None and self._by_key.get(request.key) is request:
            del self._by_key[request.key]

    def _free(self, blocks: int) -> None:
        self.batch.free += blocks
        self.wake()

    # --- steps ---

    def wake(self) -> None:
        """Schedule a step soon, unless one is running."""
        self._woken = True
        if self._timer is None:
            self._timer = self._loop.call_soon(self._begin)

    def _begin(self, moment: float | None = None) -> None:
        """Schedule a step; it begins at `moment`, now by default."""
        if frozen := self.faults.frozen_s:
            self._timer = self._loop.call_later(frozen, self._begin)
            return
        self._woken = False
        now = self._loop.time()
        step = self._step = self.batch.schedule()
        self._carry_out_commands()
        if step is None:
            self.step_times.scheduled(now, 0, 0)
            self.step_times.completed(now, idle=True)
            # A command may have freed blocks that a request waits for.
            self._timer = self._loop.call_soon(self._begin) if self._woken else None
            return
        self.step_times.scheduled(now, len(step.scheduled), step.prompt_tokens)
        for request in step.admitted:
            self._admit(request)
        due = (now if moment is None else moment) + step.seconds * self.faults.current.slow / self.settings.speed
        self._timer = self._loop.call_at(due, self._end, due)

    def _admit(self, request: Request, pulled: int = 0, *, failed: bool = False) -> None:
        """Count a request and tell its gateway, once, that it has its KV."""
        if request.admitted:
            return
        request.admitted = True
        self.counters.admitted += 1
        if not (pulled or failed):
            request.queued_s = time.perf_counter() - request.arrived
        if request.key is not None:
            self.channel.post(messages.KvReceived(request.key, pulled, failed, request.queued_s))

    def _end(self, due: float) -> None:
        """End a step: write its tokens, and begin the next."""
        if frozen := self.faults.frozen_s:
            self._timer = self._loop.call_later(frozen, self._end, self._loop.time() + frozen)
            return
        step, self._step = self._step, None
        if step is not None:
            self.batch.complete(step)
            self.step_times.completed(self._loop.time(), idle=False)
            for request in step.samplers:
                if not request.output:
                    self.prefix_cache.store(request.prompt, request.salt)
            self._writer.write(step.samplers)
            self.counters.tokens += len(step.samplers)
            if not self.faults.loses_tokens():
                self.channel.post_tokens(
                    messages.NewTokens(request.key, len(request.output) - 1, request.output[-1:])
                    for request in step.samplers
                    if request.sends_tokens and request.key is not None and request.state == "running"
                )
        now = self._loop.time()
        if now - due > _SLACK_S:
            self.counters.lag_s += now - due
            due = now
        self._begin(due)

    def finish(self, request: Request, reason: str, stop: int | str | None) -> None:
        """End a request with this finish reason and stop reason, and pin its KV where it goes on elsewhere."""
        pin = reason == "length" and not request.unwanted and (request.remote_decode or request.cut is not None)
        computed = request.computed
        blocks = self._remove(request)
        # The newest token's KV is not computed.
        self.prefix_cache.store((request.prompt + request.output)[:computed], request.salt)
        self.counters.finished += 1
        transfer = None
        if pin:
            # The newest token's KV is not computed.
            pinned = Pin(request.name, request.key, computed, unfold(request.hash, request.output[-1]), blocks)
            self.pins.add(pinned)
            if request.key is not None and (gateway := messages.owner(request.key)) in self.channel.disconnected:
                self.pins.orphan(gateway)
            transfer = kv_transfer_params(self.identity, self.boot, pinned)
        else:
            self._free(blocks)
        if request.cut is not None:
            if pin:
                self.counters.cut += 1
                stop = fields.MIGRATED
            self._answer(request, transfer)
        elif request.abandoned and reason == "length":
            stop = fields.MIGRATED
        if request.stream:
            tokens = request.output[len(request.output) - 1 if request.sent is None else request.sent :]
            request.connection.end(api.last_event(request, tokens, reason, stop))
        else:
            cached = {fields.CACHED_TOKENS: request.cached or 0} if request.key is not None else {}
            request.connection.reply(
                api.whole(request, self.settings.model, reason, stop, {**(transfer or {}), **cached} or None)
            )

    # --- pulls ---

    def _pull(self, request: Request) -> None:
        request.queued_s = time.perf_counter() - request.arrived
        self._spawn(self._load(request))

    async def _load(self, request: Request) -> None:
        source, request.source = request.source, None
        assert source is not None  # noqa: S101 - for the type checker: only such requests pull
        tokens = 0
        try:
            cached = request.cached or 0
            takes_s = transfer_s(self.settings, len(request.prompt) - cached)
            pulled = await self._puller.pull(source, takes_s, cached=cached)
        except PullError:
            self.counters.pulls_failed += 1
        else:
            self.counters.pulls += 1
            tokens = min(pulled.tokens, len(request.prompt) - 1)
            request.resume_from(pulled.tokens, pulled.hash)
        if request.state == "finished":  # aborted meanwhile
            self._free(self.batch.remove(request))
            return
        self._admit(request, tokens, failed=not tokens)
        self.batch.loaded(request, tokens)
        self.wake()

    async def _discard(self, source: dict[str, Any]) -> None:
        try:
            await self._puller.pull(source, 0.0, discard=True)
        except PullError:
            self.counters.pulls_failed += 1

    async def _extend_leases(self) -> None:
        """Renew the leases of the KV that waiting requests will pull."""
        while True:
            await asyncio.sleep(self.settings.lease_s / _EXTENSIONS)
            wanted: dict[str, list[dict[str, Any]]] = {}
            for request in list(self.requests.values()):
                if request.source is not None:
                    wanted.setdefault(request.source[fields.REMOTE_ENGINE_ID], []).append(request.source)
            for sources in wanted.values():
                try:
                    await self._puller.extend(sources[0], [source[fields.REMOTE_REQUEST_ID] for source in sources])
                except PullError:
                    continue  # it is gone, and the pull will fail

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- commands ---

    def _notify(self) -> None:
        """Wake the loop for a command; runs on the channel's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.wake)

    def _carry_out_commands(self) -> None:
        if not self.channel.waiting:
            return
        for sender, command in self.channel.commands():
            match command:
                case messages.Cut():
                    self._cut(sender, command)
                case messages.Release(key=key):
                    if not self.pins.release(key) and (request := self._by_key.get(key)) is not None:
                        request.unwanted = True
                case GatewayDisconnected(gateway=gateway):
                    self.pins.orphan(gateway)
                case GatewayExpired(gateway=gateway):
                    self._abandon(gateway)
                case messages.Connect():
                    pass  # a pull here needs no handshake

    def _abandon(self, gateway: str) -> None:
        """End the requests of a gateway that has not reconnected, each with its next token."""
        if gateway not in self.channel.disconnected:
            return
        for key, request in self._by_key.items():
            if messages.owner(key) == gateway and request.cut is None:
                request.unwanted = True
                limit = len(request.output) + 1
                if limit < request.end:
                    request.limit(limit)
                    request.abandoned = True

    def _cut(self, sender: bytes, command: messages.Cut) -> None:
        request = self._by_key.get(command.key)
        if request is None:
            self.channel.post(messages.CutResult(command.call, command.key, fields.CutOutcome.UNKNOWN), sender)
            return
        samples = self._step is not None and request in self._step.samplers
        if request.cut is not None or not samples:
            self.channel.post(messages.CutResult(command.call, command.key, fields.CutOutcome.NOT_RUNNING), sender)
            return
        request.cut = Cut(sender, command.call)
        limit = len(request.output) + 1
        if limit < request.end:
            request.limit(limit)
        else:
            # It ends by its own limit in this very step: nothing to pin, and the answer will say so.
            request.unwanted = True

    def _answer(self, request: Request, transfer: dict[str, Any] | None) -> None:
        assert request.cut is not None  # noqa: S101 - for the type checker: only cut requests are answered
        assert request.key is not None  # noqa: S101 - likewise: only requests with a key are cut
        outcome = fields.CutOutcome.FINISHED if transfer is None else fields.CutOutcome.PINNED
        output = request.output
        tail = output[-messages.CUT_TAIL_TOKENS :]
        event = messages.CutResult(request.cut.call, request.key, outcome, len(output), tail, transfer or {})
        self.channel.post(event, request.cut.sender)
