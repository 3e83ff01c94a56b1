"""The instances that a gateway knows: found by URL, watched over the control channel."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Set
from typing import Any

import aiohttp
import msgspec
import zmq
import zmq.asyncio

from ares.gateway.control.cost_models import StepTimeModel
from ares.gateway.pool.channel import watched
from ares.gateway.pool.discovery import Discovery, Served
from ares.gateway.pool.generate import EngineClient, EngineLostError, EngineRefusedError
from ares.gateway.pool.health import State
from ares.gateway.pool.subscription import Subscription
from ares.protocol import messages, rpc
from ares.protocol.fields import CutOutcome
from ares.protocol.keys import ControlKey

logger = logging.getLogger(__name__)

# Lost is what has been silent for so many telemetry intervals, and so long: a large prefill holds the interpreter.
_SILENT_INTERVALS = 20
_SILENT_S = 3.0
_FROZEN_S = 6.0
_RETRY_S = 0.5
# How often a second URL of an instance is looked at: whether the first one still leads there.
_DUPLICATE_RETRY_S = 2.0
_REMEMBERED = 1024
_RESTARTED = "it has restarted"


class NoInstanceError(Exception):
    """No instance is there to take the request."""

    code = "no_instance_ready"


OnHello = Callable[["Instance"], Coroutine[Any, Any, None]]
Claim = Callable[["Instance", messages.Description], Coroutine[Any, Any, "Instance | None"]]


class Instance:
    """One instance as the gateway sees it.

    Attributes
    ----------
    url
        Base URL of its HTTP server.
    name, role
        What it says of itself; the name is the URL until then, and has the URL's address behind it where another
        instance calls itself the same.
    called
        What it calls itself.
    hello, telemetry
        Its newest messages; None before the first. A restart clears both.
    draining
        Whether it is to become empty: what it says itself, once a command of ours has reached it.
    drain_deadline
        When what is left of it shall leave (`time.monotonic`), whoever has said so; None: not at all.
    subscription
        Ours there.
    health
        What the log and the status say of it.
    """

    def __init__(
        self,
        url: str,
        http: aiohttp.ClientSession,
        interval_s: float,
        control_key: ControlKey | None = None,
        gateway: str = "",
        served: Served | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.name = self.called = self.url
        self.role: messages.Role = "both"
        self.engine = EngineClient(http, self.url)
        self.hello: messages.Hello | None = None
        self.telemetry: messages.Telemetry | None = None
        self.steps = StepTimeModel()
        self.draining = False
        self.drain_deadline: float | None = None
        self.subscription = Subscription(gateway, interval_s)
        self._discovery = Discovery(self.url, http, served)
        self.health = self._discovery.health
        # The life of the instance that is followed; nothing while it is only looked for.
        self._following = ""
        self._doubted = False
        self._control_key = control_key
        self._interval_s = interval_s
        self._heard = self._answered = self._last_message = 0.0
        self._malformed = 0
        self._calls = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._admissions: dict[str, asyncio.Future[messages.KvReceived]] = {}
        self._admitted: dict[str, messages.KvReceived] = {}
        self._predicted: dict[str, tuple[float, float, float]] = {}
        self._socket: zmq.asyncio.Socket | None = None

    @property
    def healthy(self) -> bool:
        """Whether it has been heard of lately, and no connection to it has failed since it last answered over HTTP."""
        heard = self.telemetry is not None and time.monotonic() - self._heard < self._patience_s
        return heard and not self._doubted

    @property
    def _patience_s(self) -> float:
        return max(_SILENT_S, _SILENT_INTERVALS * self._interval_s)

    @property
    def reachable(self) -> bool:
        """Whether it answers, be it that its telemetry has stopped: serving does not depend on that (I7)."""
        return self.healthy or time.monotonic() - self._answered < _SILENT_S

    @property
    def frozen(self) -> bool:
        """Whether nothing has come from it for so long that what runs on it is better resumed elsewhere."""
        return self.telemetry is not None and time.monotonic() - self._last_message > _FROZEN_S

    def extend_deadline(self, seconds: float) -> None:
        """Do not count so many seconds of silence: nobody listened."""
        self._last_message = min(self._last_message + seconds, time.monotonic())

    @property
    def open(self) -> bool:
        """Whether it takes new work."""
        return self.healthy and not self.draining

    @property
    def capacity_tokens(self) -> int:
        """KV capacity in tokens; 0 while unknown."""
        return self.hello.kv_blocks * self.hello.block_size if self.hello else 0

    @property
    def free_blocks(self) -> int:
        """KV blocks that the newest telemetry shows free; 0 while unknown."""
        if self.hello is None or self.telemetry is None:
            return 0
        return self.hello.kv_blocks - self.telemetry.kv_blocks_used

    def lacks(self, needs: Set[str]) -> Set[str]:
        """Return what it does not restore of this state of a request that comes to it; nothing while it is unknown."""
        return needs - set(self.hello.carries) if needs and self.hello is not None else frozenset()

    def mark_lost(self) -> None:
        """Take it as lost until it answers over HTTP and is heard again: a connection to it failed.

        An engine whose HTTP server has died may go on sending telemetry.
        """
        self._heard = 0.0
        self._doubted = True

    @property
    def duplicate(self) -> bool:
        """Whether another URL leads to the same instance, and stands for it."""
        return self.health.state is State.DUPLICATE

    async def holds(self, boot: str) -> bool:
        """Whether this URL leads to that life of its instance, and it is heard."""
        self._doubted = self._doubted and self._following == boot and not await self._discovery.answers()
        return self._following == boot and not self._doubted and not self.frozen

    def let_go(self) -> None:
        """Leave the instance to another of its URLs."""
        self._following = ""

    def record_failure(self, error: Exception) -> None:
        """Take note of a failed request; raise what any other instance would answer too."""
        if isinstance(error, EngineLostError):
            self.mark_lost()
        elif isinstance(error, EngineRefusedError) and error.status < 500:
            raise error

    async def cut(self, key: str, timeout_s: float) -> messages.CutResult:
        """Ask the instance to end request `key` and keep its KV.

        Raises
        ------
        TimeoutError
            No answer in time; whether the request was cut is then unknown.
        """
        call = next(self._calls)
        answer: messages.CutResult = await self._ask(call, messages.Cut(call, key), timeout_s)
        return answer

    async def copy(self, key: str, pin: str, most: int, timeout_s: float) -> messages.CopyResult:
        """Ask the instance to pin the full KV blocks of running request `key`, at most `most` tokens, under `pin`.

        Raises
        ------
        TimeoutError
            No answer in time; what is pinned after all is released when the instance says so.
        """
        call = next(self._calls)
        answer: messages.CopyResult = await self._ask(call, messages.Copy(call, key, pin, most), timeout_s)
        return answer

    async def lease(self, holder: str, ttl_s: float, timeout_s: float) -> messages.LeaseResult | None:
        """Ask for its part of the controller's lease for so long; None where it does not answer in time."""
        call = next(self._calls)
        try:
            answer: messages.LeaseResult = await self._ask(call, messages.Lease(call, holder, ttl_s), timeout_s)
        except TimeoutError:
            return None
        return answer

    async def end_lease(self, holder: str) -> None:
        """Give its part of the lease back; nobody waits for the answer."""
        await self._send(messages.Lease(next(self._calls), holder, 0.0))

    async def _ask(self, call: int, command: messages.Command, timeout_s: float) -> Any:
        future = self._answers[call] = asyncio.get_running_loop().create_future()
        try:
            await self._send(command)
            return await asyncio.wait_for(future, timeout_s)
        finally:
            del self._answers[call]

    async def release(self, key: str) -> None:
        """Tell the instance that nobody will pull the KV of request `key`."""
        await self._send(messages.Release(key))

    async def drain(self, deadline_s: float) -> None:
        """Close the instance, and let it tell every gateway, and when what is left shall leave."""
        self.draining, self.drain_deadline = True, time.monotonic() + deadline_s
        await self._send(messages.Drain(True, deadline_s))

    async def undrain(self) -> None:
        """Open it again."""
        self.draining, self.drain_deadline = False, None
        await self._send(messages.Drain(False))

    async def connect_peers(self, peers: list[messages.Peer]) -> None:
        """Ask the instance to shake hands with peers before they are needed."""
        await self._send(messages.Connect(peers))

    async def admitted(self, key: str, timeout_s: float) -> messages.KvReceived | None:
        """Return what request `key` pulled, once the instance has said so; None where it does not in time."""
        if (known := self._admitted.pop(key, None)) is not None:
            return known
        future = self._admissions[key] = asyncio.get_running_loop().create_future()
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            return None
        finally:
            del self._admissions[key]

    def predicted(self, key: str) -> tuple[float, float, float] | None:
        """Return the remaining tokens of request `key`, which this instance prefilled, at messages.REMAINING_LEVELS.

        It comes before the prefill's reply; None where the instance does not predict. The request's own limit is not
        applied yet.
        """
        return self._predicted.get(key)

    async def _send(self, command: messages.Command) -> None:
        await self._send_bytes(rpc.encode(command))

    async def _send_bytes(self, body: bytes) -> None:
        if self._socket is not None:
            # The queue to a peer that has been gone for long is full: never wait for room in it.
            with contextlib.suppress(zmq.Again):
                await self._socket.send(body, zmq.NOBLOCK)

    async def watch(self, on_hello: OnHello, claim: Claim) -> None:
        """Find the instance and follow it until cancelled.

        `claim` returns another one that stands for the same instance, if there is one, and names this one if there is
        none; `on_hello` is awaited whenever the instance (re)appears.
        """
        while True:
            description = await self._describe()
            if description is None:
                await asyncio.sleep(_RETRY_S)
                continue
            if (other := await claim(self, description)) is not None:
                cause = f"{other.name} at {other.url} is the same instance; leave one of the two --worker out"
                self.health.turn(self._who, State.DUPLICATE, cause)
                await asyncio.sleep(_DUPLICATE_RETRY_S)
                continue
            try:
                await self._follow(description, on_hello)
            except zmq.ZMQError as error:
                self.health.turn(self._who, State.NO_TELEMETRY, f"{description.control_address}: {error}")
                await asyncio.sleep(_RETRY_S)

    @property
    def _who(self) -> str:
        return f"{self.name} ({self.url})" if self.name != self.url else self.url

    async def _describe(self) -> messages.Description | None:
        """Return who it says it is; None where it cannot be used, and then `health` says why."""
        if (found := await self._discovery.look(self._who)) is not None:
            self.role = found.role
        return found

    async def _follow(self, description: messages.Description, on_hello: OnHello) -> None:
        """Subscribe and read until the instance is silent for good, which ends in a new look at its URL."""
        socket, handshake = watched(description.control_address, self._control_key)
        self._socket = socket
        self._following, self._doubted = description.boot, False
        self._heard = time.monotonic()
        self.subscription.begin()
        try:
            while self.telemetry is None or self.healthy or not await self._restarted(description):
                if (heartbeat := self.subscription.heartbeat()) is not None:
                    await self._send_bytes(heartbeat)
                if self._following != description.boot:
                    return
                if not await socket.poll(_RETRY_S * 1000):
                    if self.telemetry is None and time.monotonic() - self._heard > _SILENT_S:
                        cause = handshake.failure(has_key=self._control_key is not None)
                        self.health.turn(self._who, State.NO_TELEMETRY, f"{description.control_address} {cause}")
                        return
                    if not rpc.has_connection(socket):
                        return  # given up, after a message that was too large
                    continue
                await self._receive(await socket.recv(), on_hello)
                if self.hello is not None and self.hello.boot != description.boot:
                    self.health.turn(self._who, State.LOST, _RESTARTED)
                    return  # on the same ports: its HTTP server comes up after its control channel
                if self.healthy:
                    self.health.turn(self._who, State.DRAINING if self.draining else State.READY)
        finally:
            self._socket = self.hello = self.telemetry = None
            self._following = ""
            handshake.close()
            socket.close()

    async def _restarted(self, description: messages.Description) -> bool:
        """Look why nothing is heard; return whether it has restarted."""
        found = await self._describe()
        if found is None:
            await asyncio.sleep(_RETRY_S)
            return False
        if found.boot != description.boot:
            self.health.turn(self._who, State.LOST, _RESTARTED)
            return True
        self._doubted = False
        self._answered = time.monotonic()
        if self._answered - self._last_message > self._patience_s:
            self.health.turn(self._who, State.LOST, "it answers over HTTP, but not over its control channel")
        return False

    async def _receive(self, body: bytes, on_hello: OnHello) -> None:
        self._last_message = time.monotonic()
        try:
            event = rpc.decode_event(body)
        except msgspec.DecodeError as error:
            self._malformed += 1
            if self._malformed.bit_count() == 1:  # ever less often
                logger.warning("%s: dropped %d malformed messages: %s", self.name, self._malformed, error)
            return
        if isinstance(event, messages.Telemetry | messages.Hello):  # an answer to a `Lease` says nothing of its load
            self._heard = self._last_message
        self.subscription.heard(again=isinstance(event, messages.Hello))
        match event:
            case messages.Telemetry():
                # What was on its way when the instance was told to drain still says the contrary.
                if self.telemetry is None or event.draining != self.telemetry.draining:
                    self.draining = event.draining
                if not self.draining:
                    self.drain_deadline = None
                elif event.drain_left_s is not None:
                    self.drain_deadline = self._last_message + event.drain_left_s
                self.telemetry = event
                self.steps.observe(event)
            case messages.CutResult() | messages.CopyResult() | messages.LeaseResult():
                asked = self._answers.get(event.call)
                if asked is not None and not asked.done():
                    asked.set_result(event)
                # Nobody waits any more: the KV must not stay pinned until its lease ends.
                elif isinstance(event, messages.CutResult) and event.outcome == CutOutcome.PINNED:
                    await self.release(event.key)
                elif isinstance(event, messages.CopyResult) and event.tokens:
                    await self.release(event.pin)
            case messages.KvReceived(key=key):
                admission = self._admissions.get(key)
                if admission is None:
                    # It may come before anybody asks; most are never asked for.
                    _remember(self._admitted, key, event)
                elif not admission.done():
                    admission.set_result(event)
            case messages.Predicted(key=key, remaining=remaining):
                _remember(self._predicted, key, remaining)
            case messages.Hello():
                self.hello = event
                self.steps = StepTimeModel()
                await on_hello(self)


def _remember(known: dict[str, Any], key: str, value: Any) -> None:
    """Keep the newest."""
    known[key] = value
    if len(known) > _REMEMBERED:
        del known[next(iter(known))]
