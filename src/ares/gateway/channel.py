"""The gateway's end of a control channel: a socket that notices when the network has forgotten its connection."""

import zmq
import zmq.asyncio

from ares import wire
from ares.keys import ControlKey

# A connection without a sign of life for this long is made anew: a network that has forgotten it says nothing. Longer
# than an instance may be silent before it counts as frozen (gateway/instances.py): the streams, on connections beside
# this one, are given up for the silence here.
_DEAD_S = 10.0
_HEARTBEAT_S = 2.0
_LINGER_MS = 200


def connected(address: str, key: ControlKey | None) -> zmq.asyncio.Socket:
    """Return a socket that connects to an instance, and connects again for as long as it is open.

    Raises
    ------
    zmq.ZMQError
        That is no address.
    """
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    # What was released last should still get there.
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.IPV6, "[" in address)
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(_HEARTBEAT_S * 1000))
    for limit in (zmq.HEARTBEAT_TIMEOUT, zmq.CONNECT_TIMEOUT, zmq.HANDSHAKE_IVL):
        socket.setsockopt(limit, int(_DEAD_S * 1000))
    if key is not None:
        key.connect(socket)
    try:
        socket.connect(address)
    except zmq.ZMQError:
        socket.close()
        raise
    return socket
