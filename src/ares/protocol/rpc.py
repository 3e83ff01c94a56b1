"""The control channel between gateways and instances: framing, limits and times, for both of its ends.

An instance binds one ROUTER socket, and each gateway connects a DEALER. A message is one frame of msgpack
(`protocol/messages.py`); on the ROUTER the identity of the sender or receiver is a frame before it. The gateway
subscribes and repeats its `Subscribe` as a heartbeat; an instance forgets a gateway that is silent for longer than
`SUBSCRIPTION_TTL_S`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

from ares.protocol.messages import Command, Event, StepTokens

# A larger message is a mistake or an attack: telemetry of 4,096 requests is below 400 kB.
MAX_MESSAGE_BYTES = 4 << 20
# An instance forgets a subscriber that has been silent for this long.
SUBSCRIPTION_TTL_S = 10.0
# How often a gateway repeats its subscription.
SUBSCRIPTION_HEARTBEAT_S = SUBSCRIPTION_TTL_S / 5
# An instance keeps the KV that is pinned for a gateway that it has forgotten for this long: a target may already have
# been asked to pull it. A target that waits extends the lease every 5 s (vLLM's kv_lease_duration / 6).
ORPHAN_LEASE_S = 10.0
# An instance ends the requests of a gateway that it forgot this long ago: no client can cancel them any more.
GATEWAY_EXPIRY_S = 30.0
# The longest time for which an instance grants its part of the controller's lease.
LONGEST_LEASE_S = 10.0
# ZeroMQ's own heartbeat on a gateway's connection, and the silence after which ZeroMQ reconnects: a network that
# drops a connection silently sends no error. The limit is longer than the silence after which a gateway
# takes an instance for frozen (gateway/pool/health.py), since the streams, on other connections, are given up then.
CONNECTION_HEARTBEAT_S = 2.0
CONNECTION_TIMEOUT_S = 10.0
# What a socket's monitor reports when the two ends do not hold the same key.
HANDSHAKE_REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

encode = msgspec.msgpack.Encoder().encode
_decode_command: Callable[[bytes], Command] = msgspec.msgpack.Decoder(Command).decode
_decode_event: Callable[[bytes], Event] = msgspec.msgpack.Decoder(Event).decode
# What msgspec raises in addition to its DecodeError: for text that is not UTF-8, and for deeply nested maps.
_MALFORMED = (UnicodeDecodeError, RecursionError)


# How each `StepTokens` begins: all of one without rows, but for their number.
_STEP_TOKENS = encode(StepTokens([]))[:-1]


def has_step_tokens(body: bytes) -> bool:
    """Whether a message is a `StepTokens`, without decoding it."""
    return body.startswith(_STEP_TOKENS)


def decode_command(body: bytes) -> Command:
    """Return the command of a message; msgspec.DecodeError where it is none."""
    try:
        return _decode_command(body)
    except _MALFORMED as error:
        raise msgspec.DecodeError(str(error)) from error


def decode_event(body: bytes) -> Event:
    """Return the event of a message; msgspec.DecodeError where it is none."""
    try:
        return _decode_event(body)
    except _MALFORMED as error:
        raise msgspec.DecodeError(str(error)) from error


def read_command(frames: Sequence[bytes]) -> tuple[bytes, Command]:
    """Return the sender and the command of what a ROUTER received; msgspec.DecodeError where it is malformed."""
    if len(frames) != 2:
        raise msgspec.DecodeError(f"{len(frames)} frames instead of a sender and a command")
    return frames[0], decode_command(frames[1])


def configure(socket: "zmq.Socket[Any]", address: str, *, linger_ms: int = 0) -> None:
    """Set the options that both ends share; to be called before the socket binds or connects.

    Parameters
    ----------
    socket
        A ROUTER or DEALER.
    address
        What it will bind or connect to, such as ``tcp://[::1]:5600``.
    linger_ms
        For how long a closed socket still tries to deliver what was sent.
    """
    socket.setsockopt(zmq.LINGER, linger_ms)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.IPV6, "[" in address)


def keep_alive(socket: "zmq.Socket[Any]") -> None:
    """Let ZeroMQ notice a connection that the network has dropped silently; to be called before the socket connects.

    The queue of what was received then has no limit. Where it is full, libzmq does not read the answers to its
    heartbeats either and connects again; what makes room next ends the process (`Assertion failed: _input_stopped`,
    libzmq issues 3937 and 4767, in 4.3.5). Instead the subscription limits the queue: whoever does not read must not
    renew it, and gets no more than an instance sends in `SUBSCRIPTION_TTL_S`. A process that is stopped receives
    nothing at all: the instance's own queue fills, and it drops what follows.
    """
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(CONNECTION_HEARTBEAT_S * 1000))
    for limit in (zmq.HEARTBEAT_TIMEOUT, zmq.CONNECT_TIMEOUT, zmq.HANDSHAKE_IVL):
        socket.setsockopt(limit, int(CONNECTION_TIMEOUT_S * 1000))


def has_connection(socket: "zmq.Socket[Any]") -> bool:
    """Whether a DEALER still has, or tries to make, its connection.

    ZeroMQ gives it up for good after a message that is larger than `MAX_MESSAGE_BYTES`.
    """
    return bool(int(socket.get(zmq.EVENTS)) & zmq.POLLOUT)
