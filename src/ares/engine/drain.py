"""The orderly end of an instance: on SIGTERM it is drained, and only then stopped."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from ares.protocol import messages, rpc
from ares.protocol.keys import ControlKey

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.2
# Nothing must have been left for this long: a gateway may have sent a request before it heard.
_QUIET_S = 1.0
# So long before an instance ends, requests that are still on it are broken off: they leave it, instead of losing it.
_LEAD_S = 2 * _QUIET_S


class OwnChannel:
    """The instance's control channel, seen from the process that serves its HTTP.

    Attributes
    ----------
    telemetry
        The newest; None before the first.
    """

    def __init__(self, address: str, key: ControlKey | None) -> None:
        self.telemetry: messages.Telemetry | None = None
        self._address, self._key = address, key
        self._socket: zmq.asyncio.Socket | None = None

    async def follow(self) -> None:
        """Keep the telemetry up to date, until cancelled."""
        while True:
            await self._listen()

    async def _listen(self) -> None:
        """Hear telemetry until ZeroMQ gives the connection up, as it does after a message that is too large."""
        loop = asyncio.get_running_loop()
        socket = self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, rpc.MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.IPV6, "[" in self._address)
        if self._key is not None:
            self._key.connect(socket)
        socket.connect(self._address)
        subscribed = float("-inf")
        try:
            while True:
                if loop.time() - subscribed > rpc.SUBSCRIPTION_TTL_S / 5:
                    subscribed = loop.time()
                    if not int(socket.get(zmq.EVENTS)) & zmq.POLLOUT:
                        return  # there is none any more, and none to come
                    await socket.send(rpc.encode(messages.Subscribe(_INTERVAL_S)))
                if await socket.poll(1000):
                    self._hear(await socket.recv())
        finally:
            self._socket = None
            socket.close()

    def _hear(self, body: bytes) -> None:
        try:
            event = rpc.decode_event(body)
        except msgspec.DecodeError as error:
            logger.warning("dropped a malformed message: %s", error)
            return
        if isinstance(event, messages.Telemetry):
            self.telemetry = event

    async def drain(self, deadline_s: float) -> None:
        """Let every gateway know, and return when nothing is left, or at the deadline."""
        if self._socket is not None:
            await self._socket.send(rpc.encode(messages.Drain(True, before(deadline_s))))
        await until_empty(self._left, deadline_s)

    def _left(self) -> int | None:
        load = self.telemetry
        return load.left if load is not None and load.draining else None


def before(deadline_s: float) -> float:
    """Return after how long gateways shall break off what is left on an instance that ends at its deadline."""
    return deadline_s - min(_LEAD_S, deadline_s / 4)


async def until_empty(left: Callable[[], int | None], deadline_s: float) -> None:
    """Return when nothing has been left for a moment, or at the deadline.

    Parameters
    ----------
    left
        How much is left; None while unknown.
    """
    loop = asyncio.get_running_loop()
    deadline, empty_since = loop.time() + deadline_s, None
    while (now := loop.time()) < deadline:
        if left() != 0:
            empty_since = None
        elif empty_since is None:
            empty_since = now
        elif now - empty_since > _QUIET_S:
            logger.info("drained")
            return
        await asyncio.sleep(_INTERVAL_S / 2)
    logger.warning("the deadline of the drain has passed: %s left", left())


@contextlib.contextmanager
def drained_on_sigterm(drain: Callable[[], Coroutine[Any, Any, None]], end: Callable[[], None]) -> Any:
    """Drain on SIGTERM and end after that; a second SIGTERM ends at once."""
    loop = asyncio.get_running_loop()
    draining: asyncio.Task[None] | None = None

    def told() -> None:
        nonlocal draining
        if draining is None:
            logger.info("SIGTERM: draining; a second one ends at once")
            draining = loop.create_task(drain())
            draining.add_done_callback(lambda _: end())
        else:
            draining.cancel()

    loop.add_signal_handler(signal.SIGTERM, told)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        if draining is not None:
            draining.cancel()
