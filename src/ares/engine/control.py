"""The instance's end of the control channel: one thread, one ROUTER socket.

The thread owns the socket. The engine thread takes commands from a queue and posts events, both without blocking;
telemetry is read from the scheduler's state by this thread, so that the engine thread pays nothing for it.
"""

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from ares.engine.expected_requests import ExpectedRequests
from ares.engine.kv_events import KvEventLog
from ares.engine.learning import service
from ares.engine.lease import ControllerLease
from ares.engine.role_state import RoleState
from ares.protocol import messages, rpc
from ares.protocol.keys import ControlKey

logger = logging.getLogger(__name__)

# The longest that the thread sleeps; bounds the time to stop.
_IDLE_S = 0.5
_SHORTEST_INTERVAL_S = 0.01
# How many disconnected gateways are remembered.
_MAX_DISCONNECTED = 256


def _authenticator(context: "zmq.Context[zmq.Socket[bytes]]", key: ControlKey) -> ThreadAuthenticator:
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback("*", key)
    return authenticator


@dataclass(frozen=True, slots=True)
class GatewayDisconnected:
    """A gateway closed its connection, or was silent for too long: KV that is pinned for it may stay unpulled."""

    gateway: str


@dataclass(frozen=True, slots=True)
class GatewayExpired:
    """A gateway has been disconnected for so long that its requests are to end: no client reads their output."""

    gateway: str


# What the engine thread has to carry out.
EngineCommand = messages.Command | GatewayDisconnected | GatewayExpired


class _Subscriber:
    __slots__ = ("due", "expires", "follows_kv", "gateway", "interval")

    def __init__(self) -> None:
        self.gateway = ""
        self.follows_kv = False
        self.interval = _IDLE_S
        self.due = 0.0
        self.expires = 0.0


class ControlChannel:
    """Serves one instance's control channel.

    Parameters
    ----------
    address
        ZeroMQ address to bind, such as ``tcp://127.0.0.1:5600``.
    hello
        The first message to a new subscriber.
    telemetry
        Called on the channel's thread for each telemetry message; must only read. None sends nothing.
    notify
        Called on the channel's thread when a command waits; for engines that would sleep meanwhile.
    key
        The key that a gateway must hold; None accepts every connection.
    learning
        Answers a learner; None where the instance does not learn.
    kv_events
        The KV events of the engine, for the gateways that follow them; closed with the channel.

    Attributes
    ----------
    expected
        The requests that gateways have announced.
    refused
        How many connections were refused.
    draining
        Whether the telemetry reports a drain, which a command or the instance itself has begun.
    disconnected
        Names of the gateways that have not connected again, and when (`time.monotonic`) their requests are to end.
    """

    def __init__(
        self,
        address: str,
        hello: messages.Hello,
        telemetry: Callable[[], messages.Telemetry | None],
        notify: Callable[[], None] = lambda: None,
        key: ControlKey | None = None,
        learning: service.LearningService | None = None,
        kv_events: KvEventLog | None = None,
    ) -> None:
        self._learning = learning
        self._kv_events = kv_events
        self._hello = hello
        self._roles = RoleState(hello.role, hello.roles)
        self._telemetry = telemetry
        self._notify = notify
        self._commands: deque[tuple[bytes, EngineCommand]] = deque()
        # To a subscriber, to a gateway by its name, or to all.
        self._outgoing: deque[tuple[bytes | str | None, bytes]] = deque()
        self._subscribers: dict[bytes, _Subscriber] = {}
        self.draining = False
        self._drain_deadline: float | None = None
        self.disconnected: dict[str, float] = {}
        self._lease = ControllerLease()
        self.expected = ExpectedRequests()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self.refused = 0
        # With a key, a separate context: a context asks one authenticator for all its sockets.
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance() if key is None else zmq.Context()
        self._authenticator = _authenticator(context, key) if key is not None else None
        self._own_context = context if key is not None else None
        self._socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        if key is not None:
            key.serve(self._socket)
        self._refusals = self._socket.get_monitor_socket(rpc.HANDSHAKE_REFUSED)
        self._refusals.setsockopt(zmq.LINGER, 0)
        rpc.configure(self._socket, address)
        # An error when the receiver has disconnected, where ROUTER would drop the message silently.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            self._socket.bind(address)
        except zmq.ZMQError:
            self._close_sockets()
            os.close(self._wake)
            raise
        self._thread = threading.Thread(target=self._run, name="ares-control", daemon=True)
        self._thread.start()

    @property
    def role(self) -> messages.Role:
        """The role of the instance now. Any thread."""
        return self._roles.role

    @property
    def waiting(self) -> bool:
        """Whether commands wait for the engine thread."""
        return bool(self._commands)

    def commands(self) -> list[tuple[bytes, EngineCommand]]:
        """Take the waiting commands with their senders. Engine thread only."""
        commands = []
        while self._commands:
            commands.append(self._commands.popleft())
        return commands

    def post(self, event: messages.Event, receiver: bytes | None = None) -> None:
        """Send an event to one gateway, or to every subscriber. Any thread."""
        self.send(rpc.encode(event), receiver)

    def post_tokens(self, rows: Iterable[messages.NewTokens]) -> None:
        """Send each gateway the new tokens of its requests. Any thread."""
        by_gateway: dict[str, list[messages.NewTokens]] = {}
        for row in rows:
            by_gateway.setdefault(messages.owner(row.key), []).append(row)
        for gateway, its in by_gateway.items():
            self.send(rpc.encode(messages.StepTokens(its)), gateway)

    def send(self, body: bytes, receiver: bytes | str | None = None) -> None:
        """Send an encoded event to one subscriber, to the gateway of a name, or to every subscriber. Any thread."""
        if self._stopping:
            return
        self._outgoing.append((receiver, body))
        os.eventfd_write(self._wake, 1)

    def drain(self, draining: bool, deadline_s: float | None = None) -> None:
        """Report in the telemetry whether the instance drains, and when the rest must leave. Any thread."""
        known = draining and deadline_s is not None
        self._drain_deadline = time.monotonic() + (deadline_s or 0.0) if known else None
        self.draining = draining

    def close(self) -> None:
        """Stop the thread and close the socket."""
        if self._stopping:
            return
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout=2 * _IDLE_S)
        # Not by the thread: it may end before the write, and the descriptor may then belong to another file.
        if not self._thread.is_alive():
            os.close(self._wake)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        poller.register(self._refusals, zmq.POLLIN)
        if self._kv_events is not None:
            poller.register(self._kv_events.socket, zmq.POLLIN)
        while not self._stopping:
            now = time.monotonic()
            due = min((s.due for s in self._subscribers.values()), default=now + _IDLE_S)
            for ready, _ in poller.poll(int(max(0.0, min(due - now, _IDLE_S)) * 1000)):
                if ready == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                elif ready is self._refusals:
                    self._refuse()
                elif ready is self._socket:
                    self._receive()
                else:
                    self._send_kv_events()
            try:
                self._expire_gateways(time.monotonic())
                self._send_due(time.monotonic())
            except Exception:  # telemetry must never end the channel: the next tick tries again
                logger.exception("telemetry failed")
        self._close_sockets()

    def _close_sockets(self) -> None:
        if self._kv_events is not None:
            self._kv_events.close()
        self._socket.disable_monitor()
        self._refusals.close()
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        if self._own_context is not None:
            self._own_context.destroy(linger=0)

    def _refuse(self) -> None:
        """Count a connection without the right key; log it less and less often."""
        recv_monitor_message(self._refusals, zmq.NOBLOCK)
        self.refused += 1
        if self.refused.bit_count() == 1:
            logger.warning("refused %d connections to the control channel: a wrong key, or none", self.refused)

    def _receive(self) -> None:
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                sender, command = rpc.read_command(frames)
            except msgspec.DecodeError as error:
                logger.warning("dropped a malformed command: %s", error)
                continue
            if isinstance(command, messages.Subscribe):
                self._subscribe(sender, command)
            elif isinstance(command, messages.Drain):
                self.drain(command.draining, command.deadline_s)
                self._report_at_once()
            elif isinstance(command, messages.Expect):
                self.expected.add(command.key, command.within_s, time.monotonic())
            elif isinstance(command, messages.ChangeRole):
                self._outgoing.append((sender, rpc.encode(self._roles.order(command, time.monotonic()))))
                self._report_at_once()
            elif isinstance(command, messages.Lease):
                self._outgoing.append((sender, rpc.encode(self._lease.request(command, time.monotonic()))))
            elif isinstance(command, messages.FollowKvEvents):
                self._follow_kv_events(sender, command)
            elif isinstance(command, service.LearningCommand):
                self._outgoing.append((sender, rpc.encode(self._learn(command))))
            else:
                self._commands.append((sender, command))
                self._notify()

    def _report_at_once(self) -> None:
        """Let every gateway know before another one closes an instance, too (gateway/control/closing.py)."""
        for subscriber in self._subscribers.values():
            subscriber.due = 0.0

    def _learn(self, command: service.LearningCommand) -> messages.Event:
        try:
            return service.refusal(command) if self._learning is None else self._learning.answer(command)
        except Exception:  # learning must never end the channel
            logger.exception("a learner's command failed")
            return service.refusal(command, "it failed on the instance, whose log has the reason")

    def _follow_kv_events(self, sender: bytes, command: messages.FollowKvEvents) -> None:
        """Send a subscriber what is kept; what it has no room for now it will miss, and ask for again."""
        if self._kv_events is None or (subscriber := self._subscribers.get(sender)) is None:
            return
        if command.paced:
            body, subscriber.follows_kv = self._kv_events.part(command.since)
            self._send(sender, body)
            return
        subscriber.follows_kv = True
        for body in self._kv_events.since(command.since):
            self._send(sender, body)

    def _send_kv_events(self) -> None:
        if self._kv_events is not None:
            for body in self._kv_events.read():
                for target in [identity for identity, one in self._subscribers.items() if one.follows_kv]:
                    self._send(target, body)

    def _subscribe(self, sender: bytes, command: messages.Subscribe) -> None:
        now = time.monotonic()
        subscriber = self._subscribers.get(sender)
        if subscriber is None:
            subscriber = self._subscribers[sender] = _Subscriber()
            self._outgoing.append((sender, rpc.encode(msgspec.structs.replace(self._hello, role=self._roles.role))))
        subscriber.gateway = command.gateway
        self.disconnected.pop(command.gateway, None)
        # In this order NaN gives the shortest; an infinite interval must not outlast the subscription.
        subscriber.interval = min(max(_SHORTEST_INTERVAL_S, command.interval_s), rpc.SUBSCRIPTION_TTL_S)
        subscriber.due = min(subscriber.due, now + subscriber.interval)
        subscriber.expires = now + rpc.SUBSCRIPTION_TTL_S

    def _send_due(self, now: float) -> None:
        while self._outgoing:
            receiver, body = self._outgoing.popleft()
            for target in (receiver,) if isinstance(receiver, bytes) else self._identities(receiver):
                self._send(target, body)
        due = [identity for identity, subscriber in self._subscribers.items() if subscriber.due <= now]
        for identity in due:
            subscriber = self._subscribers[identity]
            subscriber.due = now + subscriber.interval
            if subscriber.expires < now:
                self._forget(identity)
        # After the next due times are set: a report that fails is tried again then, not at once and without end.
        if due:
            load = self._telemetry()
            if load is None:
                return
            load = self._roles.report(load, now)
            body = rpc.encode(self._with_drain(load, now) if self.draining else load)
            for identity in due:
                if identity in self._subscribers:
                    self._send(identity, body)

    def _identities(self, gateway: str | None) -> list[bytes]:
        """Return the subscribers with that name, or all."""
        return [identity for identity, one in self._subscribers.items() if gateway is None or one.gateway == gateway]

    def _with_drain(self, load: messages.Telemetry, now: float) -> messages.Telemetry:
        deadline = self._drain_deadline
        left_s = max(0.0, deadline - now) if deadline is not None else None
        return msgspec.structs.replace(load, draining=True, drain_left_s=left_s)

    def _send(self, identity: bytes, body: bytes) -> None:
        try:
            self._socket.send_multipart((identity, body), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # Otherwise it reads more slowly than it asked for: it loses telemetry, and stays subscribed.
            if error.errno == zmq.EHOSTUNREACH and identity in self._subscribers:
                self._forget(identity)

    def _expire_gateways(self, now: float) -> None:
        """Order the end of the requests of every gateway that has been disconnected for too long."""
        for gateway in [gateway for gateway, due in self.disconnected.items() if due <= now]:
            self.disconnected[gateway] = math.inf
            self._commands.append((b"", GatewayExpired(gateway)))
            self._notify()

    def _forget(self, identity: bytes) -> None:
        """Drop a subscriber; where its gateway has no other connection, tell the engine thread."""
        gateway = self._subscribers.pop(identity).gateway
        if not gateway or any(other.gateway == gateway for other in self._subscribers.values()):
            return
        self.disconnected[gateway] = time.monotonic() + rpc.GATEWAY_EXPIRY_S
        if len(self.disconnected) > _MAX_DISCONNECTED:
            del self.disconnected[next(iter(self.disconnected))]
        self._lease.release(gateway)
        self._commands.append((identity, GatewayDisconnected(gateway)))
        self._notify()
