"""The gateway's end of a control channel: a socket that notices when the network has forgotten its connection."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from ares.protocol import rpc
from ares.protocol.fields import CONTROL_KEY_VARIABLE
from ares.protocol.keys import ControlKey

_LINGER_MS = 200
# Messages that have come already are read one after another; other work of the loop goes between so many of them.
_IN_A_ROW = 16
# A larger one takes long to read, such as a replay of KV events: then it goes on after each.
_LARGE_BYTES = 64 << 10
# While so many wait for their reader, no more are received.
_MOST_WAITING = 64
_NOBLOCK = int(zmq.NOBLOCK)
_GIVE_KEY = f"(--control-key-file or {CONTROL_KEY_VARIABLE}, the same for all)"


def connected(address: str, key: ControlKey | None) -> zmq.asyncio.Socket:
    """Return a socket that connects to an instance, and connects again for as long as it is open.

    Raises
    ------
    zmq.ZMQError
        That is no address.
    """
    socket, handshake = watched(address, key)
    handshake.close()
    return socket


def watched(address: str, key: ControlKey | None) -> tuple[zmq.asyncio.Socket, "Handshake"]:
    """Return such a socket, and how far its connection has come.

    Raises
    ------
    zmq.ZMQError
        That is no address.
    """
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    # What was released last should still get there.
    rpc.configure(socket, address, linger_ms=_LINGER_MS)
    rpc.keep_alive(socket)
    if key is not None:
        key.connect(socket)
    handshake = Handshake(socket)  # before the first attempt
    try:
        socket.connect(address)
    except zmq.ZMQError:
        handshake.close()
        socket.close()
        raise
    return socket, handshake


class ControlSocket:
    """Sends and receives the messages of a socket, in one event loop.

    pyzmq's asyncio layer makes a future and polls for each message, which takes four times as long.

    Parameters
    ----------
    socket
        A DEALER that nothing else receives from; to be closed by its owner, after this.
    take
        Given each message as it arrives; where it returns True the message is done with. Others are for `next`.
    """

    def __init__(self, socket: zmq.asyncio.Socket, take: Callable[[bytes], bool] = lambda _: False) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Socket.shadow(socket.underlying)
        self._descriptor = int(self._socket.get(zmq.FD))
        self._take = take
        self._messages: deque[bytes] = deque()
        self._arrival: asyncio.Future[None] | None = None
        self._behind_since: float | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._receive)
        self._again: asyncio.Handle | None = self._loop.call_soon(self._receive)

    def send(self, body: bytes) -> None:
        """Send a message; where the queue is full, to a peer that has been gone for long, it is dropped."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(body, _NOBLOCK)
        # libzmq signals arrivals once, and may have read that signal while it sent.
        self._receive_soon()

    def has_connection(self) -> bool:
        """Whether it still has, or tries to make, its connection (`rpc.has_connection`)."""
        found = rpc.has_connection(self._socket)
        self._receive_soon()  # as in `send`: to ask libzmq may read a signal, too
        return found

    @property
    def keeps_up(self) -> bool:
        """Whether all that had come has been received lately.

        libzmq's own queue has no limit here (`rpc.keep_alive`): a gateway that has not emptied it for as long as a
        subscription lasts must not renew its own, so that the instance sends no more.
        """
        return self._behind_since is None or self._loop.time() - self._behind_since < rpc.SUBSCRIPTION_TTL_S

    async def next(self, timeout_s: float) -> bytes | None:
        """Return the next message; None where none came in so many seconds."""
        if not self._messages:
            arrival = self._arrival = self._loop.create_future()
            timer = self._loop.call_later(timeout_s, _wake, arrival)
            try:
                await arrival
            finally:
                timer.cancel()
        if not self._messages:
            return None
        if len(self._messages) == _MOST_WAITING:
            self._receive_soon()
        return self._messages.popleft()

    def close(self) -> None:
        """Receive no more."""
        self._loop.remove_reader(self._descriptor)
        if self._again is not None:
            self._again.cancel()

    def _receive_soon(self) -> None:
        if self._again is None:
            self._again = self._loop.call_soon(self._receive)

    def _receive(self) -> None:
        """Receive what has come, a few messages in a row."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        size = 0
        for _ in range(_IN_A_ROW):
            if len(self._messages) == _MOST_WAITING or size >= _LARGE_BYTES:
                break
            try:
                body = self._socket.recv(_NOBLOCK)
            except zmq.Again:
                self._behind_since = None
                return
            size = len(body)
            if not self._take(body):
                self._messages.append(body)
                if self._arrival is not None:
                    _wake(self._arrival)
        if self._behind_since is None:
            self._behind_since = self._loop.time()
        if len(self._messages) < _MOST_WAITING:
            self._receive_soon()


def _wake(waiting: "asyncio.Future[None]") -> None:
    if not waiting.done():
        waiting.set_result(None)


class Handshake:
    """How far the connection of a socket has come, for when nothing comes over it.

    To be closed when something has come: where a thousand events wait to be read, libzmq's I/O thread waits too, and
    with it all sockets.
    """

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        events = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | rpc.HANDSHAKE_REFUSED
        self._receiver = socket.get_monitor_socket(events)
        # Read now and then, and never waited for.
        self._monitor: zmq.Socket[bytes] = zmq.Socket.shadow(self._receiver.underlying)

    def failure(self, *, has_key: bool) -> str:
        """Return why nothing has come, and what to do.

        Parameters
        ----------
        has_key
            Whether the gateway has a control key.
        """
        seen = 0
        while self._monitor.poll(0):
            seen |= recv_monitor_message(self._monitor)["event"]
        if seen & zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return "is open, but nothing comes; see the instance's own log"
        if not seen & zmq.EVENT_CONNECTED:
            return (
                "cannot be reached; open that port to the gateway, or start the instance with another --host or "
                "--advertise-host"
            )
        if not seen & rpc.HANDSHAKE_REFUSED:
            return "takes connections and does not answer; does another program use that port?"
        if not has_key:
            return f"asks for a control key and this gateway has none; give it the instance's {_GIVE_KEY}"
        # Which end notices first that only one of them has a key is left to chance.
        return f"has another control key than this gateway, or none; give both the same {_GIVE_KEY}"

    def close(self) -> None:
        """Stop watching; again changes nothing.

        The receiver is closed last: with nobody to receive it, libzmq's I/O thread would wait for ever to send an
        event, with the lock that is needed to stop (socket_base.cpp, `stop_monitor`, 4.3.5).
        """
        if not self._receiver.closed:
            self._socket.disable_monitor()
            self._receiver.close(0)
