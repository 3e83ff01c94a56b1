"""One instance, as the learner sees it: it hands over recorded states, and gets the champion."""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import zmq
import zmq.asyncio

from ares.gateway.pool.channel import watched
from ares.gateway.pool.discovery import Unusable, describe
from ares.learner.settings import LearnerSettings
from ares.protocol import messages, rpc
from ares.protocol.keys import ControlKey

logger = logging.getLogger(__name__)

_TELEMETRY_S = 1.0
# Without any message for this long, the instance is looked for anew.
_SILENT_S = 10.0
# A checkpoint that has arrived is in use, or refused, within this long.
_LOADED_S = 60.0
_AGAIN_S = 5.0
# Names of shards that an instance has handed over.
_REMEMBERED = 1000


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What the learner does for an instance.

    Attributes
    ----------
    take
        Store a shard (the instance, the bytes); False where there is no room for it now.
    wanted
        The version that an instance should run, from what it runs; None to leave it alone.
    data
        The bytes of a version; OSError where they cannot be read.
    refused
        An instance has refused a version, and why.
    claim
        Whether no other URL leads to the instance with this boot id.
    """

    take: Callable[["Instance", bytes], bool]
    wanted: Callable[["Instance", str], str | None]
    data: Callable[[str], bytes]
    refused: Callable[["Instance", str, str], None]
    claim: Callable[["Instance", str], bool]


class _LostError(Exception):
    """The connection is to be made anew."""


class Instance:
    """One instance, followed over its control channel until its task is cancelled.

    Attributes
    ----------
    name, boot
        As it describes itself.
    hello
        Its description of itself; None while it is not connected.
    running
        The version that it runs; None until it has reported.
    """

    def __init__(
        self,
        url: str,
        learner: str,
        http: aiohttp.ClientSession,
        key: ControlKey | None,
        settings: LearnerSettings,
        callbacks: Callbacks,
    ) -> None:
        self.url = self.name = url
        self.boot = ""
        self.hello: messages.Hello | None = None
        self.running: str | None = None
        self._learner = learner
        self._http = http
        self._key = key
        self._settings = settings
        self._do = callbacks
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._wrong = ""
        # The version that was sent last, and until when it is not sent again.
        self._sent: tuple[str, float] | None = None
        self._refused: set[str] = set()
        # A version that has arrived whole, until it is refused: the telemetry repeats a refusal without end.
        self._arrived = ""
        # Whether it gives its recorded states to this learner, and not to another one.
        self._belongs = False

    async def follow(self) -> None:
        """Find the instance, and follow it for as long as it answers; then look for it again."""
        while True:
            found = await describe(self._http, self.url)
            if isinstance(found, Unusable):
                self._note(found.cause)
            elif not self._do.claim(self, found.boot):
                self._note("another URL leads to the same instance")
            else:
                self.name = found.name
                if found.boot != self.boot:
                    self.boot, self._sent, self._refused = found.boot, None, set()
                try:
                    await self._connected(found.control_address)
                except* (zmq.ZMQError, _LostError) as errors:
                    self._note(str(errors.exceptions[0]))
                finally:
                    self.hello = self.running = None
                    self._belongs = False
            await asyncio.sleep(min(_AGAIN_S, self._settings.find_s))

    def _note(self, why: str) -> None:
        """Log what is wrong with it, once."""
        if why != self._wrong:
            logger.warning("%s: %s", self.name, why)
        self._wrong = why

    async def _connected(self, address: str) -> None:
        socket, handshake = watched(address, self._key)
        heard = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(
                    self._receive(socket, heard, lambda: handshake.failure(has_key=self._key is not None))
                )
                tasks.create_task(self._stay_subscribed(socket))
                await heard.wait()
                assert self.hello is not None  # noqa: S101 - for the type checker
                if not self.hello.learns:
                    self._note("it does not take part in learning (start it with --learn, in this version): left alone")
                    return await asyncio.Event().wait()  # type: ignore[return-value] # until it is lost
                self._wrong = ""
                tasks.create_task(self._take_recorded(socket))
                tasks.create_task(self._send_champion(socket))
        finally:
            for future in self._calls.values():
                future.cancel()
            self._calls.clear()
            handshake.close()
            socket.close()

    async def _receive(self, socket: zmq.asyncio.Socket, heard: asyncio.Event, failure: Callable[[], str]) -> None:
        while True:
            if not await socket.poll(_SILENT_S * 1000):
                raise _LostError(
                    "it does not report any more" if heard.is_set() else f"its control channel {failure()}"
                )
            try:
                event = rpc.decode_event(await socket.recv())
            except msgspec.DecodeError as error:
                self._note(f"a malformed message: {error}")
                continue
            match event:
                case messages.Hello(boot=boot):
                    if boot != self.boot:
                        raise _LostError("it has restarted")
                    self.hello = event
                    heard.set()
                case messages.Telemetry(predictor=version, predictor_refused=(refused, why)):
                    self.running = version
                    if refused and refused == self._arrived:
                        self._on_refused(refused, why)
                case messages.Recorded(call=call) | messages.CheckpointReceived(call=call):
                    future = self._calls.get(call)
                    if future is not None and not future.done():
                        future.set_result(event)

    async def _stay_subscribed(self, socket: zmq.asyncio.Socket) -> None:
        heartbeat = rpc.encode(messages.Subscribe(_TELEMETRY_S))
        while True:
            await self._send(socket, heartbeat)
            await asyncio.sleep(rpc.SUBSCRIPTION_HEARTBEAT_S)

    async def _take_recorded(self, socket: zmq.asyncio.Socket) -> None:
        """Take one shard after the other; each is named back only when it is on our disk."""
        stored: list[str] = []
        before: deque[str] = deque(maxlen=_REMEMBERED)
        while True:
            call = next(self._numbers)
            answer = await self._call(socket, call, messages.TakeRecorded(call, self._learner, stored))
            if answer is None:
                continue  # those stored are named again
            stored = []
            self._belongs = not answer.refused
            if answer.refused:
                self._note(f"left alone for now: {answer.refused}")
                await asyncio.sleep(self._settings.find_s)
            elif not answer.name:
                await asyncio.sleep(self._settings.take_s)
            elif self._do.take(self, answer.data):
                stored = [answer.name]
                if answer.name in before:  # it cannot delete it, and would send it again without end
                    await asyncio.sleep(self._settings.take_s)
                before.append(answer.name)
            else:
                await asyncio.sleep(self._settings.find_s)

    async def _send_champion(self, socket: zmq.asyncio.Socket) -> None:
        """Send the champion whenever the instance runs something else."""
        while True:
            await asyncio.sleep(min(_TELEMETRY_S, self._settings.take_s))
            if self.running is None or not self._belongs:
                continue
            wanted = self._do.wanted(self, self.running)
            if wanted is None or wanted == self.running:
                continue
            if self._sent is not None and self._sent[0] == wanted and time.monotonic() < self._sent[1]:
                continue
            await self._send_version(socket, wanted)

    async def _send_version(self, socket: zmq.asyncio.Socket, version: str) -> None:
        self._sent = (version, time.monotonic() + _LOADED_S)
        try:
            data = self._do.data(version) if version else b""
        except OSError as error:
            self._note(f"{version[:12]} cannot be sent: {error}")
            self._sent = (version, time.monotonic() + _AGAIN_S)
            return
        offset = 0
        while offset < len(data) or not offset:
            part = data[offset : offset + messages.LARGEST_PART_BYTES]
            call = next(self._numbers)
            command = messages.CheckpointPart(call, self._learner, version, offset, len(data), part)
            answer = await self._call(socket, call, command)
            if answer is None:
                return  # from the beginning, later
            if answer.refused:
                self._on_refused(version, answer.refused)
                return
            offset += len(part)
            if not data:
                break
        self._arrived = version
        logger.info("%s has been sent %s", self.name, version[:12] or "the order to run without a checkpoint")

    def _on_refused(self, version: str, why: str) -> None:
        self._sent, self._arrived = (version, time.monotonic() + self._settings.retry_s), ""
        if version not in self._refused:
            self._refused.add(version)
            self._do.refused(self, version, why)

    async def _call(self, socket: zmq.asyncio.Socket, call: int, command: messages.Command) -> Any:
        """Send a command and return its answer; None where it does not come in time."""
        future = self._calls[call] = asyncio.get_running_loop().create_future()
        try:
            await self._send(socket, rpc.encode(command))
            async with asyncio.timeout(self._settings.answer_s):
                return await future
        except TimeoutError:
            return None
        finally:
            self._calls.pop(call, None)

    async def _send(self, socket: zmq.asyncio.Socket, body: bytes) -> None:
        try:
            await socket.send(body, zmq.NOBLOCK)
        except zmq.Again:
            if not rpc.has_connection(socket):
                raise _LostError("its connection has ended") from None
