"""A control channel with a key: who has it is accepted, others are refused and counted."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from ares.protocol import messages
from ares.protocol.keys import ControlKey
from tests.engine.control_channel import HELLO, Gateway, Instance, until

pytestmark = pytest.mark.timeout(20)
KEY = ControlKey("k" * 32)


def without_a_key(_: zmq.Socket) -> None:  # type: ignore[type-arg]
    """Connect as to an open channel."""


def with_another_key(socket: zmq.Socket) -> None:  # type: ignore[type-arg]
    ControlKey("j" * 32).connect(socket)


def with_the_public_key_only(socket: zmq.Socket) -> None:  # type: ignore[type-arg]
    """Connect to the right server key with another client key, which only an authenticator refuses."""
    KEY.connect(socket)
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()


def test_a_connection_with_the_key_is_accepted() -> None:
    instance = Instance(KEY)
    gateway = Gateway(instance.address, KEY.connect)
    try:
        gateway.send(messages.Subscribe(0.02))
        assert gateway.receive() == HELLO
        gateway.send(messages.Release("mine"))
        assert instance.commands(1) == [messages.Release("mine")]
        assert instance.channel.refused == 0
    finally:
        gateway.close()
        instance.channel.close()


@pytest.mark.parametrize("secure", [without_a_key, with_another_key, with_the_public_key_only])
def test_a_connection_without_the_key_sends_and_receives_nothing(
    secure: Callable[[zmq.Socket], None],  # type: ignore[type-arg]
    caplog: pytest.LogCaptureFixture,
) -> None:
    instance = Instance(KEY)
    stranger = Gateway(instance.address, secure)
    try:
        stranger.send(messages.Subscribe(0.01))
        stranger.send(messages.Drain(True))
        stranger.send(messages.Release("somebody's"))
        until(lambda: instance.channel.refused > 0)
        assert stranger.receive(0.1) is None
        assert not instance.channel.draining
        assert not instance.channel.waiting
        assert instance.taken == 0
    finally:
        stranger.close()
        instance.channel.close()
    assert "refused 1 connections" in caplog.text
    assert "kkkk" not in caplog.text


def test_a_gateway_with_a_key_does_not_talk_to_an_open_channel(instance: Instance) -> None:
    gateway = Gateway(instance.address, KEY.connect)
    try:
        gateway.send(messages.Subscribe(0.01))
        until(lambda: instance.channel.refused > 0)
        assert instance.taken == 0
    finally:
        gateway.close()


def nothing_left_behind() -> None:
    """Count threads and files over channels with a key; in a process of its own, where nothing else opens any."""
    Instance(KEY).channel.close()
    threads, files = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        Instance(KEY).channel.close()
    until(lambda: threading.active_count() <= threads)
    until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= files)


def test_a_channel_with_a_key_leaves_nothing_behind() -> None:
    script = "from tests.engine.control.test_keys import nothing_left_behind; nothing_left_behind()"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
