"""The gateway's end of a control channel: a socket that notices when the network has forgotten its connection."""

import asyncio
import contextlib

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


class Inbox:
    """Receives what comes over a socket. To poll first would cost as much again for each message."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        # The same socket, without the work of pyzmq's asyncio layer for each message.
        self._at_once: zmq.Socket[bytes] = zmq.Socket.shadow(socket.underlying)
        self._receiving: asyncio.Future[bytes] | None = None
        self._in_a_row = 0

    async def next(self, timeout_s: float) -> bytes | None:
        """Return the next message; None where none came in so many seconds."""
        receiving = self._receiving
        if receiving is None:
            if self._in_a_row >= _IN_A_ROW:
                self._in_a_row = 0
                await asyncio.sleep(0)
            with contextlib.suppress(zmq.Again):
                body = self._at_once.recv(_NOBLOCK)
                self._in_a_row += 1 if len(body) < _LARGE_BYTES else _IN_A_ROW
                return body
            receiving = self._receiving = asyncio.ensure_future(self._socket.recv())
        if not receiving.done():
            # Not cancelled by the timeout: a message that came in that moment would be lost.
            await asyncio.wait((receiving,), timeout=timeout_s)
        if not receiving.done():
            return None
        self._receiving = None
        return receiving.result()


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
