"""vLLM's KV events on their way to gateways: read within the engine's process, kept for a while, and sent on.

vLLM's own socket (distributed/kv_events.py, 0.32) listens on all interfaces or on none, without a key, and its events
have the tokens of prompts. So `ares worker` lets it publish inside of the process, and the control channel, which has
a key, sends the events to gateways. What an operator has configured stays as it is, and is read as well.
"""

import json
import logging
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Protocol

import zmq

from ares.protocol import messages, rpc

logger = logging.getLogger(__name__)

ENDPOINT = "inproc://ares-kv-events"
# What `ares worker` adds to the flags.
FLAG_VALUE = json.dumps({"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": ENDPOINT})
# A token takes some five bytes.
_KEPT_BYTES = 16 << 20
_BATCH_OVERHEAD = 100
_MESSAGE_BYTES = 1 << 20
# Of an answer to a gateway that asks again: it takes a gateway some 2 ms.
_PART_BYTES = 128 << 10
# Batches that wait to be read; vLLM drops further ones.
_HIGH_WATER_MARK = 10_000
_SEQUENCE_BYTES = 8


class KvEventsConfig(Protocol):
    """vLLM's KVEventsConfig (config/kv_events.py, 0.32)."""

    enable_kv_cache_events: bool
    publisher: str
    endpoint: str
    topic: str


def readable_endpoint(config: KvEventsConfig | None) -> str | None:
    """Return where this process can read what vLLM publishes; None where it publishes nothing, or to a collector."""
    if config is None or not config.enable_kv_cache_events or config.publisher != "zmq":
        return None
    endpoint = config.endpoint
    if endpoint.startswith(("inproc://", "ipc://")):
        return endpoint
    # vLLM binds these (ZmqEventPublisher._is_bind_endpoint); with port 0 it tells nobody which one it has.
    port = endpoint.rpartition(":")[2]
    if not port.isdecimal() or int(port) == 0:
        return None
    if "*" in endpoint:
        return f"tcp://127.0.0.1:{port}"
    return endpoint.replace("[::]", "[::1]") if "::" in endpoint else None


class KvEventLog:
    """The newest batches of one instance, numbered without gaps; for the thread of the control channel alone.

    Parameters
    ----------
    endpoint, topic
        Where they are published in vLLM's form.
    kept_bytes
        For gateways that come later, or have lost some: of more bytes the oldest batches are dropped.
    message_bytes
        Of the batches in one message; a larger batch counts as lost.

    Attributes
    ----------
    socket
        Has batches to read.
    """

    def __init__(
        self, endpoint: str, topic: str = "", kept_bytes: int = _KEPT_BYTES, message_bytes: int = _MESSAGE_BYTES
    ) -> None:
        # Inside of a process both ends must have the same context, and vLLM's is this one.
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self.socket.set_hwm(_HIGH_WATER_MARK)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.IPV6, "[" in endpoint)
        self.socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self.socket.connect(endpoint)
        self._batches: deque[bytes] = deque()
        self._bytes = 0
        self._kept_bytes, self._message_bytes = kept_bytes, message_bytes
        self._kept_from = 0
        self._expected: int | None = None

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def read(self) -> list[bytes]:
        """Return the messages with the batches that have come."""
        begin = self._next
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(frames) != 3 or len(frames[1]) != _SEQUENCE_BYTES:
                continue
            number = int.from_bytes(frames[1], "big")
            if self._expected is not None and number > self._expected:
                logger.warning("lost %d batches of KV events", number - self._expected)
                self._keep(b"")
            self._expected = number + 1
            self._keep(frames[2] if len(frames[2]) <= self._message_bytes else b"")
        return list(self.since(begin)) if self._next > begin else []

    def since(self, sequence: int) -> Iterator[bytes]:
        """Yield messages with the batches that are kept, from this number on."""
        first = max(sequence, self._kept_from)
        batches: list[bytes] = []
        size = 0
        for number in range(first, self._next):
            batch = self._batches[number - self._kept_from]
            if batches and size + len(batch) > self._message_bytes:
                yield self._message(first, batches)
                first, batches, size = number, [], 0
            batches.append(batch)
            size += len(batch)
        if batches:
            yield self._message(first, batches)

    def part(self, sequence: int) -> tuple[bytes, bool]:
        """Return one message with the first batches that are kept from this number on, and whether these are all."""
        first = end = max(sequence, self._kept_from)
        size = 0
        while end < self._next and (end == first or size + len(self._batches[end - self._kept_from]) <= _PART_BYTES):
            size += len(self._batches[end - self._kept_from])
            end += 1
        batches = list(islice(self._batches, first - self._kept_from, end - self._kept_from))
        return rpc.encode(messages.KvEvents(first, self._kept_from, batches, self._next)), end >= self._next

    @property
    def _next(self) -> int:
        return self._kept_from + len(self._batches)

    def _message(self, first: int, batches: list[bytes]) -> bytes:
        return rpc.encode(messages.KvEvents(first, self._kept_from, batches))

    def _keep(self, batch: bytes) -> None:
        self._batches.append(batch)
        self._bytes += len(batch) + _BATCH_OVERHEAD
        while self._bytes > self._kept_bytes:
            self._bytes -= len(self._batches.popleft()) + _BATCH_OVERHEAD
            self._kept_from += 1
