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
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from ares.engine.lease import Lease
from ares.protocol import messages, rpc
from ares.protocol.keys import ControlKey

logger = logging.getLogger(__name__)

# How long the thread sleeps when nothing happens; bounds the time to stop.
_IDLE_S = 0.5
_SHORTEST_INTERVAL_S = 0.01
# Gateways whose end is remembered.
_MOST_GONE = 256


_REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


def _authenticator(context: "zmq.Context[zmq.Socket[bytes]]", key: ControlKey) -> ThreadAuthenticator:
    made = ThreadAuthenticator(context)
    made.start()
    made.configure_curve_callback("*", key)
    return made


@dataclass(frozen=True, slots=True)
class Gone:
    """A gateway has closed its connection, or been silent for too long: nobody may come for what is kept for it."""

    gateway: str


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A gateway has been gone for so long that nobody takes the output of its requests."""

    gateway: str


Order = messages.Command | Gone | Abandoned


class _Subscriber:
    __slots__ = ("due", "expires", "gateway", "interval")

    def __init__(self) -> None:
        self.gateway = ""
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
        What a new subscriber is told first.
    snapshot
        Called on the channel's thread for each telemetry message; must only read. None sends nothing.
    notify
        Called on the channel's thread when a command waits; for engines that would sleep meanwhile.
    key
        What a gateway must hold; None lets everybody in.

    Attributes
    ----------
    refused
        Connections that were not let in.
    draining
        Whether the telemetry says so: by command, or by the instance itself.
    gone
        Names of the gateways that have gone and not come back, and when (`time.monotonic`) their requests are to end.
    """

    def __init__(
        self,
        address: str,
        hello: messages.Hello,
        snapshot: Callable[[], messages.Telemetry | None],
        notify: Callable[[], None] = lambda: None,
        key: ControlKey | None = None,
    ) -> None:
        self._hello = rpc.encode(hello)
        self._snapshot = snapshot
        self._notify = notify
        self._commands: deque[tuple[bytes, Order]] = deque()
        self._outgoing: deque[tuple[bytes | None, bytes]] = deque()
        self._subscribers: dict[bytes, _Subscriber] = {}
        self.draining = False
        self._drain_deadline: float | None = None
        self.gone: dict[str, float] = {}
        self._lease = Lease()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self.refused = 0
        # With a key, a context of its own: a context asks one authenticator for all its sockets.
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance() if key is None else zmq.Context()
        self._authenticator = _authenticator(context, key) if key is not None else None
        self._own_context = context if key is not None else None
        self._socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        if key is not None:
            key.serve(self._socket)
        self._refusals = self._socket.get_monitor_socket(_REFUSALS)
        self._refusals.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, rpc.MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.IPV6, "[" in address)
        # An error for who is not there any more, where it would say nothing.
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
    def waiting(self) -> bool:
        """Whether commands wait for the engine thread."""
        return bool(self._commands)

    def commands(self) -> list[tuple[bytes, Order]]:
        """Take the waiting commands with their senders. Engine thread only."""
        taken = []
        while self._commands:
            taken.append(self._commands.popleft())
        return taken

    def post(self, event: messages.Event, receiver: bytes | None = None) -> None:
        """Send an event to one gateway, or to every subscriber. Any thread."""
        if self._stopping:
            return
        self._outgoing.append((receiver, rpc.encode(event)))
        os.eventfd_write(self._wake, 1)

    def drain(self, draining: bool, deadline_s: float | None = None) -> None:
        """Let the telemetry say whether it drains, and how long until what is left shall leave. Any thread."""
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
        # Not by the thread: it may end before the write, and the number may then be another file's.
        if not self._thread.is_alive():
            os.close(self._wake)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        poller.register(self._refusals, zmq.POLLIN)
        while not self._stopping:
            now = time.monotonic()
            due = min((s.due for s in self._subscribers.values()), default=now + _IDLE_S)
            for ready, _ in poller.poll(int(max(0.0, min(due - now, _IDLE_S)) * 1000)):
                if ready == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                elif ready is self._refusals:
                    self._refuse()
                else:
                    self._receive()
            try:
                self._abandon(time.monotonic())
                self._send_due(time.monotonic())
            except Exception:  # telemetry must never end the channel: the next tick tries again
                logger.exception("telemetry failed")
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._socket.disable_monitor()
        self._refusals.close()
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        if self._own_context is not None:
            self._own_context.destroy(linger=0)

    def _refuse(self) -> None:
        """Count somebody who does not hold the key, and say so ever less often."""
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
                sender, body = frames
                command = rpc.decode_command(body)
            except (ValueError, msgspec.DecodeError) as error:
                logger.warning("dropped a malformed command: %s", error)
                continue
            if isinstance(command, messages.Subscribe):
                self._subscribe(sender, command)
            elif isinstance(command, messages.Drain):
                self.drain(command.draining, command.deadline_s)
            elif isinstance(command, messages.Lease):
                self._outgoing.append((sender, rpc.encode(self._lease.ask(command, time.monotonic()))))
            else:
                self._commands.append((sender, command))
                self._notify()

    def _subscribe(self, sender: bytes, command: messages.Subscribe) -> None:
        now = time.monotonic()
        subscriber = self._subscribers.get(sender)
        if subscriber is None:
            subscriber = self._subscribers[sender] = _Subscriber()
            self._outgoing.append((sender, self._hello))
        subscriber.gateway = command.gateway
        self.gone.pop(command.gateway, None)
        # This order also for NaN; and whoever asks for nothing is forgotten with the others.
        subscriber.interval = min(max(_SHORTEST_INTERVAL_S, command.interval_s), rpc.SUBSCRIPTION_TTL_S)
        subscriber.due = min(subscriber.due, now + subscriber.interval)
        subscriber.expires = now + rpc.SUBSCRIPTION_TTL_S

    def _send_due(self, now: float) -> None:
        while self._outgoing:
            receiver, body = self._outgoing.popleft()
            for target in (receiver,) if receiver is not None else tuple(self._subscribers):
                self._send(target, body)
        ticking = [identity for identity, s in self._subscribers.items() if s.due <= now]
        for identity in ticking:
            subscriber = self._subscribers[identity]
            subscriber.due = now + subscriber.interval
            if subscriber.expires < now:
                self._forget(identity)
        # After the next ticks are set: a snapshot that fails is tried again then, not at once and without end.
        if ticking:
            load = self._snapshot()
            if load is None:
                return
            body = rpc.encode(self._with_drain(load, now) if self.draining else load)
            for identity in ticking:
                if identity in self._subscribers:
                    self._send(identity, body)

    def _with_drain(self, load: messages.Telemetry, now: float) -> messages.Telemetry:
        deadline = self._drain_deadline
        left_s = max(0.0, deadline - now) if deadline is not None else None
        return msgspec.structs.replace(load, draining=True, drain_left_s=left_s)

    def _send(self, identity: bytes, body: bytes) -> None:
        try:
            self._socket.send_multipart((identity, body), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # Else it reads slower than it asked, and loses telemetry, not us.
            if error.errno == zmq.EHOSTUNREACH and identity in self._subscribers:
                self._forget(identity)

    def _abandon(self, now: float) -> None:
        """Let the requests end of every gateway that had time enough to come back."""
        for gateway in [gateway for gateway, due in self.gone.items() if due <= now]:
            self.gone[gateway] = math.inf
            self._commands.append((b"", Abandoned(gateway)))
            self._notify()

    def _forget(self, identity: bytes) -> None:
        """Drop a subscriber; the engine thread is told of a gateway that has no other connection."""
        gateway = self._subscribers.pop(identity).gateway
        if not gateway or any(other.gateway == gateway for other in self._subscribers.values()):
            return
        self.gone[gateway] = time.monotonic() + rpc.GATEWAY_EXPIRY_S
        if len(self.gone) > _MOST_GONE:
            del self.gone[next(iter(self.gone))]
        self._lease.end(gateway)
        self._commands.append((identity, Gone(gateway)))
        self._notify()
