"""One instance of a gateway: found by URL, followed over its control channel."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Literal

import aiohttp
import msgspec
import zmq

from ares.gateway.pool.channel import ControlSocket, watched
from ares.gateway.pool.control_client import ControlClient
from ares.gateway.pool.delta import EngineLostError, EngineRefusedError
from ares.gateway.pool.discovery import Discovery, Served, Unusable, key_refused
from ares.gateway.pool.generate import EngineClient
from ares.gateway.pool.health import Health, Status
from ares.gateway.pool.kv_replay import KvReplay
from ares.gateway.pool.state import InstanceState
from ares.gateway.pool.subscription import Subscription
from ares.gateway.tuning import DEFAULT, Tuning
from ares.protocol import messages, rpc
from ares.protocol.keys import ControlKey

logger = logging.getLogger(__name__)

_RESTARTED = "it has restarted"
Work = Literal["prefill", "decode"]
# The role that excludes each kind of work.
_EXCLUDES: dict[Work, messages.Role] = {"prefill": "decode", "decode": "prefill"}


def excluded_by(role: messages.Role) -> list[Work]:
    """Return the work that a role excludes."""
    return [work for work, excludes in _EXCLUDES.items() if excludes == role]


class NoInstanceError(Exception):
    """No instance can take the request."""

    code = "no_instance_ready"


OnHello = Callable[["Instance"], Coroutine[Any, Any, None]]
Claim = Callable[["Instance", messages.Description], Coroutine[Any, Any, Unusable | None]]


class Instance:
    """One instance as the gateway sees it.

    Attributes
    ----------
    url
        Base URL of its HTTP server.
    name, role
        As it describes itself; until then the name is the URL. Where several instances describe themselves by the same
        name, the address follows it.
    next_role, changes_by
        The role that it is about to have, and until when (`time.monotonic`), if it changes; None for no change.
    on_role
        Called with the role and the next role before, when one of them has changed.
    own_name
        The name by which it describes itself.
    engine
        Sends it requests.
    control
        Sends it commands.
    health
        Whether it can be used.
    state
        Its size and load.
    subscription
        The gateway's, at the instance.
    description
        The newest one of itself; None before the first.
    named
        Whether something still names its URL.
    leaving, why_leaving, leave_by
        Whether it is to be forgotten, why, and when its requests must have left (`time.monotonic`).
    watched_since
        When it was added (`time.monotonic`).
    wants_kv_events
        Whether to follow its KV events, where it publishes them; some placements need them.
    intercept
        Returns each message as it is to be read, or None where it is to be lost; fault injection sets it.
    """

    def __init__(
        self,
        url: str,
        http: aiohttp.ClientSession,
        interval_s: float,
        control_key: ControlKey | None = None,
        gateway: str = "",
        served: Served | None = None,
        tuning: Tuning = DEFAULT,
        replay_turn: asyncio.Lock | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.name = self.own_name = self.url
        self.role: messages.Role = "both"
        self.next_role: messages.Role | None = None
        self.changes_by = 0.0
        self.on_role: Callable[[messages.Role, messages.Role | None], None] = lambda *_: None
        self.engine = EngineClient(http, self.url, tuning)
        self.control = ControlClient(tuning.kept_reports)
        self.health = Health(interval_s, tuning)
        self.state = InstanceState()
        self.subscription = Subscription(gateway, interval_s)
        self.description: messages.Description | None = None
        self.intercept: Callable[[Instance, bytes], bytes | None] = lambda _, body: body
        self.named, self.leaving = True, False
        self.why_leaving = ""
        self.leave_by = 0.0
        self.watched_since = time.monotonic()
        self.wants_kv_events = False
        self._follows_kv_events = False
        self._kv_replay = KvReplay(replay_turn or asyncio.Lock(), self.control.send)
        self._discovery = Discovery(self.url, http, served, self.health)
        # Boot id of the instance that is followed; empty while it is only looked for.
        self._following = ""
        self._control_key = control_key
        self._tuning = tuning
        self._malformed = self._key_refusals = 0
        self._handlers: dict[type, Callable[[Any], Awaitable[None]]] = {
            messages.Hello: self._on_hello,
            messages.Telemetry: self._on_telemetry,
            messages.CutResult: self.control.on_result,
            messages.CopyResult: self.control.on_result,
            messages.LeaseResult: self.control.on_result,
            messages.RoleResult: self.control.on_result,
            messages.KvReceived: self.control.on_kv_received,
            messages.Predicted: self.control.on_predicted,
            messages.StepTokens: self._on_step_tokens,
            messages.KvEvents: self._on_kv_events,
        }

    @property
    def open(self) -> bool:
        """Whether it takes new work."""
        return self.health.healthy and not self.closing

    def does(self, work: Work) -> bool:
        """Whether its role has this work, and it is not about to give it up."""
        return _EXCLUDES[work] not in (self.role, self.next_role)

    def takes(self, work: Work) -> bool:
        """Whether it takes new work of this kind."""
        return self.does(work) and self.open

    @property
    def closing(self) -> bool:
        """Whether its requests are to leave it: it drains, or is to be forgotten."""
        return self.state.draining or self.leaving

    @property
    def empty_by(self) -> float | None:
        """When requests that are still there must leave it (`time.monotonic`); None where there is no deadline."""
        drained_by = self.state.drain_deadline if self.state.draining else None
        if not self.leaving:
            return drained_by
        return self.leave_by if drained_by is None else min(drained_by, self.leave_by)

    @property
    def duplicate(self) -> bool:
        """Whether another URL leads to the same instance, and is used instead."""
        return self.health.status is Status.DUPLICATE

    @property
    def sends_step_tokens(self) -> bool:
        """Whether tokens may come over its control channel: not unencrypted where its replies are encrypted."""
        offered = self.state.hello is not None and self.state.hello.step_tokens
        return offered and (self._control_key is not None or not self.engine.encrypted)

    async def leads_to(self, boot: str) -> bool:
        """Whether this URL leads to the instance with that boot id, and it reports."""
        health = self.health
        health.suspect = health.suspect and self._following == boot and not await self._discovery.answers()
        return self._following == boot and not health.suspect and not health.frozen

    def release(self) -> None:
        """Stop following the instance: another URL leads to it, or its pool does not use it any more."""
        self._following = ""

    def record_failure(self, error: Exception) -> None:
        """Note a failed request; raise an error that any other instance would answer with too."""
        if isinstance(error, EngineLostError):
            self.health.connection_failed()
        elif isinstance(error, EngineRefusedError) and error.status in (401, 403):
            # The gateway's key, or a proxy before this instance: discovery, on other routes, has found nothing wrong.
            self._key_refusals += 1
            if self._key_refusals.bit_count() == 1:  # 1, 2, 4, 8 ... of them
                why = key_refused(error.status)
                logger.warning("%s refused %d requests: %s", self._log_name, self._key_refusals, why)
        elif isinstance(error, EngineRefusedError) and error.status < 500:
            raise error

    async def drain(self, deadline_s: float) -> None:
        """Close it; it reports that to every gateway. Requests that are still there after `deadline_s` leave it."""
        self.state.drain(deadline_s)
        await self.control.drain(deadline_s)

    async def undrain(self) -> None:
        """Open it again."""
        self.state.undrain()
        await self.control.undrain()

    def leave(self, why: str, deadline_s: float) -> None:
        """Close it here, for this gateway alone: it is to be forgotten, its requests have so long to leave it."""
        self.leaving, self.why_leaving = True, why
        self.leave_by = time.monotonic() + deadline_s
        if self.health.healthy:
            self._set_status(*self._open_status)

    def stay(self) -> None:
        """Keep it, if it was about to leave."""
        if self.leaving:
            self.leaving, self.why_leaving = False, ""
            if self.health.healthy:
                self._set_status(*self._open_status)

    @property
    def _open_status(self) -> tuple[Status, str]:
        """The status of one that reports, and the cause."""
        if self.leaving:
            return Status.LEAVING, self.why_leaving
        return (Status.DRAINING if self.state.draining else Status.READY), ""

    # --- following it ---

    async def watch(self, on_hello: OnHello, claim: Claim) -> None:
        """Find the instance and follow it until cancelled.

        `claim` names the instance, or returns why its pool does not use it; `on_hello` is awaited whenever the instance
        (re)appears.
        """
        while True:
            description = await self._describe()
            if description is None:
                await asyncio.sleep(self._tuning.reconnect_s)
                continue
            if (unusable := await claim(self, description)) is not None:
                self._set_status(unusable.status, unusable.cause)
                await asyncio.sleep(self._tuning.duplicate_check_s)
                continue
            try:
                await self._follow(description, on_hello)
            except zmq.ZMQError as error:
                self._set_status(Status.NO_TELEMETRY, f"{description.control_address}: {error}")
                await asyncio.sleep(self._tuning.reconnect_s)

    @property
    def _log_name(self) -> str:
        return f"{self.name} ({self.url})" if self.name != self.url else self.url

    def _set_status(self, status: Status, cause: str = "") -> None:
        self.health.set_status(self._log_name, status, cause)

    async def _describe(self) -> messages.Description | None:
        """Return its description of itself; None where it cannot be used, and then `health` knows why."""
        if (found := await self._discovery.look(self._log_name)) is not None:
            self.description = found
            self.role = found.role
            self.state.adapters = frozenset(found.adapters)
        return found

    async def _follow(self, description: messages.Description, on_hello: OnHello) -> None:
        """Subscribe and read until the connection is given up; then the URL is looked at anew."""
        socket, handshake = watched(description.control_address, self._control_key)
        channel = ControlSocket(socket, self._take_tokens)
        self.control.attach(channel)
        self._following = description.boot
        self.health.connected()
        self.subscription.begin()
        try:
            while not self.health.reports or self.health.healthy or not await self._restarted(description):
                if channel.keeps_up and (heartbeat := self.subscription.heartbeat()) is not None:
                    await self.control.send(heartbeat)
                if self._following != description.boot:
                    return
                self._follow_kv_events()
                if (body := await channel.next(self._tuning.reconnect_s)) is None:
                    if self.health.never_reported:
                        cause = handshake.failure(has_key=self._control_key is not None)
                        self._set_status(Status.NO_TELEMETRY, f"{description.control_address} {cause}")
                        return
                    if not channel.has_connection():
                        return  # given up, after a message that was too large
                    continue
                handshake.close()
                await self.receive(body, on_hello)
                if self.state.hello is not None and self.state.hello.boot != description.boot:
                    self._set_status(Status.LOST, _RESTARTED)
                    return  # on the same ports: its HTTP server comes up after its control channel
                if self.health.healthy:
                    self._set_status(*self._open_status)
        finally:
            self._kv_replay.stop()
            self.control.detach()
            self.state.clear()
            self.next_role = None
            self.health.disconnected()
            self._following = ""
            handshake.close()
            channel.close()
            socket.close()

    async def _restarted(self, description: messages.Description) -> bool:
        """Find out why it does not report; return whether it has restarted."""
        found = await self._describe()
        if found is None:
            await asyncio.sleep(self._tuning.reconnect_s)
            return False
        if found.boot != description.boot:
            self._set_status(Status.LOST, _RESTARTED)
            return True
        self.health.answered()
        if self.health.only_answers:
            self._set_status(Status.LOST, "it answers over HTTP, but not over its control channel")
        return False

    # --- its messages ---

    async def receive(self, body: bytes, on_hello: OnHello) -> None:
        """Take a message of the instance; `on_hello` as in `watch`."""
        event, role = self._read(body), self.role
        if event is not None:
            await self._handlers[type(event)](event)
        if isinstance(event, messages.Hello) or (self.role != role and self.state.hello is not None):
            await on_hello(self)

    def _read(self, body: bytes) -> messages.Event | None:
        """Return the event of a message; None where it is lost, or malformed."""
        changed = self.intercept(self, body)
        if changed is None:
            return None
        self.health.received()
        try:
            event = rpc.decode_event(changed)
        except msgspec.DecodeError as error:
            self._malformed += 1
            if self._malformed.bit_count() == 1:  # 1, 2, 4, 8 ... of them
                logger.warning("%s: dropped %d malformed messages: %s", self.name, self._malformed, error)
            return None
        self.subscription.received(greeting=isinstance(event, messages.Hello))
        return event

    def _take_tokens(self, body: bytes) -> bool:
        """Take the message if it has the tokens of a step: no task is woken for them."""
        if not rpc.has_step_tokens(body):
            return False
        if isinstance(event := self._read(body), messages.StepTokens):
            self.engine.receive_step(event)
        return True

    async def _on_telemetry(self, event: messages.Telemetry) -> None:
        now = self.health.reported(load=True)
        self.state.update(event, now)
        if event.role is not None:
            self.changes_by = now + event.role_left_s
            self._set_role(event.role, event.next_role)

    async def _on_step_tokens(self, event: messages.StepTokens) -> None:
        self.engine.receive_step(event)

    async def change_role(self, role: messages.Role, deadline_s: float, timeout_s: float) -> messages.RoleResult:
        """Order a change of role, as `ControlClient.change_role`."""
        answer = await self.control.change_role(role, deadline_s, timeout_s)
        self.changes_by = time.monotonic() + deadline_s
        self._set_role(answer.role, answer.next_role)
        return answer

    def _set_role(self, role: messages.Role, next_role: messages.Role | None) -> None:
        before = self.role, self.next_role
        if before != (role, next_role):
            self.role, self.next_role = role, next_role
            self.on_role(*before)

    async def _on_hello(self, event: messages.Hello) -> None:
        self.health.reported(load=False)
        self.state.start(event)
        self._follows_kv_events = False

    def _follow_kv_events(self) -> None:
        hello = self.state.hello
        if self.wants_kv_events and not self._follows_kv_events and hello is not None and hello.kv_events:
            self._follows_kv_events = True
            self._kv_replay.ask(self.state.cached.next)

    async def _on_kv_events(self, event: messages.KvEvents) -> None:
        begun = time.perf_counter()
        if (since := self.state.cached.receive(event)) is not None:
            self._kv_replay.ask(since)
        self._kv_replay.taken(time.perf_counter() - begun)
