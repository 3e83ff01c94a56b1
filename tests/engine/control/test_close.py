"""The end of a control channel: its thread, its files and its address."""

import os
import threading
import time

import pytest
import zmq

from ares.engine.control import ControlChannel
from ares.protocol import messages
from tests.engine.control_channel import HELLO, Gateway, Instance

pytestmark = pytest.mark.timeout(20)


def control_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "ares-control"}


def test_close_ends_the_thread_and_frees_the_address() -> None:
    before = control_threads()
    instance = Instance()
    assert len(control_threads() - before) == 1
    instance.channel.close()
    assert control_threads() <= before
    until = time.monotonic() + 20
    while True:  # ZeroMQ frees the port in another thread
        try:
            ControlChannel(instance.address, HELLO, instance.telemetry).close()
            return
        except zmq.ZMQError:
            assert time.monotonic() < until, "the address is still taken"
            time.sleep(0.01)


def test_close_does_not_write_to_a_file_that_its_thread_has_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread may end between the flag that stops it and the wake-up that follows."""
    before = control_threads()
    instance = Instance()
    (thread,) = control_threads() - before
    write = os.eventfd_write

    def write_late(file: int, value: int) -> None:
        thread.join(5)
        assert not thread.is_alive()
        write(file, value)

    monkeypatch.setattr(os, "eventfd_write", write_late)
    instance.channel.close()


def test_nothing_fails_after_close() -> None:
    instance = Instance()
    gateway = Gateway(instance.address)
    gateway.send(messages.Subscribe(0.01))
    gateway.receive_a(messages.Telemetry)
    instance.channel.close()
    instance.channel.post(messages.KvReceived("x", 0, failed=False))
    instance.channel.close()
    assert instance.channel.commands() == []
    gateway.close()


def test_a_taken_address_is_an_error(instance: Instance) -> None:
    with pytest.raises(zmq.ZMQError):
        ControlChannel(instance.address, HELLO, instance.telemetry)
