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
# The instance must have been empty for this long: a gateway may have sent a request before it knew of the drain.
_EMPTY_S = 1.0
# Gateways move the requests that are left this long before the instance ends, so that none is lost with it.
_MARGIN_S = 2 * _EMPTY_S


class OwnControlChannel:
    """The instance's control channel, seen from the process that serves its HTTP.

    Attributes
    ----------
    hello, telemetry
        The newest of each; None before the first.
    """

    def __init__(self, address: str, key: ControlKey | None) -> None:
        self.hello: messages.Hello | None = None
        self.telemetry: messages.Telemetry | None = None
        self._address, self._key = address, key
        self._socket: zmq.asyncio.Socket | None = None

    async def follow(self) -> None:
        """Keep the telemetry up to date, until cancelled."""
        while True:
            await self._receive_telemetry()

    async def _receive_telemetry(self) -> None:
        """Receive telemetry until ZeroMQ gives the connection up, as it does after a message that is too large."""
        loop = asyncio.get_running_loop()
        socket = self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        rpc.configure(socket, self._address)
        if self._key is not None:
            self._key.connect(socket)
        socket.connect(self._address)
        subscribed = float("-inf")
        try:
            while True:
                if loop.time() - subscribed > rpc.SUBSCRIPTION_HEARTBEAT_S:
                    subscribed = loop.time()
                    if not rpc.has_connection(socket):
                        return
                    await socket.send(rpc.encode(messages.Subscribe(_INTERVAL_S)))
                if await socket.poll(1000):
                    self._take(await socket.recv())
        finally:
            self._socket = None
            socket.close()

    def _take(self, body: bytes) -> None:
        try:
            event = rpc.decode_event(body)
        except msgspec.DecodeError as error:
            logger.warning("dropped a malformed message: %s", error)
            return
        if isinstance(event, messages.Telemetry):
            self.telemetry = event
        elif isinstance(event, messages.Hello):
            self.hello = event

    async def drain(self, deadline_s: float) -> None:
        """Tell every gateway to drain the instance; return when it is empty, or at the deadline."""
        if self._socket is not None:
            await self._socket.send(rpc.encode(messages.Drain(True, gateway_deadline(deadline_s))))
        await wait_until_empty(self._left, deadline_s)

    def _left(self) -> int | None:
        load = self.telemetry
        return load.left if load is not None and load.draining else None


def gateway_deadline(deadline_s: float) -> float:
    """Return after how many seconds gateways move what is left on an instance that ends after `deadline_s`."""
    return deadline_s - min(_MARGIN_S, deadline_s / 4)


async def wait_until_empty(left: Callable[[], int | None], deadline_s: float) -> None:
    """Return when the instance has been empty for a moment, or at the deadline.

    Parameters
    ----------
    left
        Returns how many requests and pins are left; None while unknown.
    """
    loop = asyncio.get_running_loop()
    deadline, empty_since = loop.time() + deadline_s, None
    while (now := loop.time()) < deadline:
        if left() != 0:
            empty_since = None
        elif empty_since is None:
            empty_since = now
        elif now - empty_since > _EMPTY_S:
            logger.info("drained")
            return
        await asyncio.sleep(_INTERVAL_S / 2)
    logger.warning("the deadline of the drain has passed: %s left", left())


@contextlib.contextmanager
def drained_on_sigterm(drain: Callable[[], Coroutine[Any, Any, None]], end: Callable[[], None]) -> Any:
    """Drain on SIGTERM and end after that; a second SIGTERM ends at once."""
    loop = asyncio.get_running_loop()
    draining: asyncio.Task[None] | None = None

    def on_sigterm() -> None:
        nonlocal draining
        if draining is None:
            logger.info("SIGTERM: draining; a second one ends at once")
            draining = loop.create_task(drain())
            draining.add_done_callback(lambda _: end())
        else:
            draining.cancel()

    loop.add_signal_handler(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        if draining is not None:
            draining.cancel()
