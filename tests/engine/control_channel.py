"""The two ends of a control channel, without an engine and without a gateway."""

import contextlib
import itertools
import time
from collections.abc import Callable
from typing import TypeVar

import zmq

from ares.engine.control import ControlChannel, EngineCommand
from ares.free_ports import free_port
from ares.protocol import messages, rpc
from ares.protocol.keys import ControlKey

T = TypeVar("T")
HELLO = messages.Hello("d0", "decode", "boot", messages.Peer("e", "h", 1), 16, 100, 4096, {})


def free_address() -> str:
    return f"tcp://127.0.0.1:{free_port('127.0.0.1')}"


class Gateway:
    """One subscriber."""

    def __init__(self, address: str, secure: Callable[[zmq.Socket], None] = lambda _: None) -> None:  # type: ignore[type-arg]
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        # A connection that was refused takes nothing more.
        self._socket.setsockopt(zmq.SNDTIMEO, 1000)
        secure(self._socket)
        self._socket.connect(address)

    def send(self, command: messages.Command) -> None:
        with contextlib.suppress(zmq.Again):
            self._socket.send(rpc.encode(command))

    def send_frames(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def receive(self, timeout_s: float = 5.0) -> messages.Event | None:
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        return rpc.decode_event(self._socket.recv())

    def received(self, within_s: float) -> list[messages.Event]:
        """Return what comes within some time."""
        deadline, events = time.monotonic() + within_s, []
        while (left := deadline - time.monotonic()) > 0:
            if (event := self.receive(left)) is not None:
                events.append(event)
        return events

    def receive_a(self, kind: type[T]) -> T:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            event = self.receive(1.0)
            if isinstance(event, kind):
                return event
        raise AssertionError(f"no {kind.__name__}")

    def close(self) -> None:
        self._socket.close()


class Instance:
    """A channel, and the telemetry that it reads."""

    def __init__(self, key: ControlKey | None = None) -> None:
        self.address = free_address()
        self.numbers = itertools.count(1)
        self.taken = 0
        self.failing = False
        self.channel = ControlChannel(self.address, HELLO, self.telemetry, key=key)

    def telemetry(self) -> messages.Telemetry:
        self.taken = next(self.numbers)
        if self.failing:
            raise RuntimeError("the scheduler changed while it was read")
        return messages.Telemetry(self.taken, 0, 0, 0, 0, 0.0, 0, 0, [])

    def commands(self, count: int) -> list[EngineCommand]:
        found: list[EngineCommand] = []
        until(lambda: bool(found.extend(command for _, command in self.channel.commands()) or len(found) >= count))
        return found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def subscribed(instance: Instance, name: str, interval_s: float = 0.01) -> Gateway:
    made = Gateway(instance.address)
    made.send(messages.Subscribe(interval_s, name))
    made.receive_a(messages.Telemetry)
    return made
