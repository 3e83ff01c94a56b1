"""The gateway's end of a control channel: a socket that notices when the network has forgotten its connection."""

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from ares.protocol import messages
from ares.protocol.keys import ControlKey

# A connection that has been silent for this long is replaced: a network that has lost it sends no error. Longer than an
# instance may be silent before it counts as frozen (gateway/pool/health.py): its streams, which use other connections,
# are given up for the silence of this one.
_DEAD_S = 10.0
_HEARTBEAT_S = 2.0
_LINGER_MS = 200
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_GIVE_KEY = "(--control-key-file or ARES_CONTROL_KEY, the same for all)"


def connected(address: str, key: ControlKey | None) -> zmq.asyncio.Socket:
    """Return a socket that connects to an instance, and connects again for as long as it is open.

    Raises
    ------
    zmq.ZMQError
        The address is not valid.
    """
    socket, handshake = watched(address, key)
    handshake.close()
    return socket


def watched(address: str, key: ControlKey | None) -> tuple[zmq.asyncio.Socket, "Handshake"]:
    """Return such a socket, and the progress of its connection.

    Raises
    ------
    zmq.ZMQError
        The address is not valid.
    """
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    # The last releases should still arrive.
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, messages.MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.IPV6, "[" in address)
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(_HEARTBEAT_S * 1000))
    for limit in (zmq.HEARTBEAT_TIMEOUT, zmq.CONNECT_TIMEOUT, zmq.HANDSHAKE_IVL):
        socket.setsockopt(limit, int(_DEAD_S * 1000))
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


class Handshake:
    """How far the connection of a socket has come, to explain why nothing is heard."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        events = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | _REFUSED
        # Read now and then, and never waited for.
        self._monitor: zmq.Socket[bytes] = zmq.Socket.shadow(socket.get_monitor_socket(events).underlying)

    def failure(self, *, has_key: bool) -> str:
        """Return why nothing is heard, and what to do.

        Parameters
        ----------
        has_key
            Whether the gateway has a control key.
        """
        seen = 0
        while self._monitor.poll(0):
            seen |= recv_monitor_message(self._monitor)["event"]
        if seen & zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return "is open, and nothing comes; see the instance's own log"
        if not seen & zmq.EVENT_CONNECTED:
            return "cannot be reached; open that port to the gateway, or start the instance with another --host"
        if not seen & _REFUSED:
            return "takes connections and does not answer; does another program use that port?"
        if not has_key:
            return f"asks for a control key and this gateway has none; give it the instance's {_GIVE_KEY}"
        # Which end notices first that only one of them has a key is a matter of chance.
        return f"has another control key than this gateway, or none; give both the same {_GIVE_KEY}"

    def close(self) -> None:
        """Stop watching the connection."""
        self._socket.disable_monitor()
        self._monitor.close(0)
