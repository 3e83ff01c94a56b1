"""Messages of a socket: each once and in order, whether they wait already or are waited for."""

import asyncio
import contextlib
import itertools
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import zmq
import zmq.asyncio

from ares.gateway.pool.channel import ControlSocket
from ares.protocol import rpc
from tests.waiting import eventually

COUNT = 100
# In a process of its own: what hangs is not Python, and holds its lock.
OPENED_AND_CLOSED = """
import asyncio
import zmq
from ares.gateway.pool.channel import connected

async def main():
    server = zmq.Context().socket(zmq.ROUTER)
    port = server.bind_to_random_port("tcp://127.0.0.1")
    for number in range(12_000):
        connected(f"tcp://127.0.0.1:{port}", None).close(0)
        # Closed sockets are gone a little later.
        await asyncio.sleep(0.05 if number % 300 == 0 else 0)

asyncio.run(main())
"""
# Also in a process of its own, which libzmq would end: nothing is received until the connection would have timed out.
NOT_READ_FOR_LONG = """
import asyncio
import time
import zmq
from ares.gateway.pool.channel import ControlSocket, connected
from ares.protocol import rpc

rpc.CONNECTION_HEARTBEAT_S, rpc.CONNECTION_TIMEOUT_S = 0.1, 0.3

async def main():
    server = zmq.Context().socket(zmq.ROUTER)
    server.set_hwm(0)
    port = server.bind_to_random_port("tcp://127.0.0.1")
    socket = connected(f"tcp://127.0.0.1:{port}", None)
    channel = ControlSocket(socket)
    channel.send(b"subscribe")
    gateway, _ = await asyncio.to_thread(server.recv_multipart)
    for number in range(5000):
        server.send_multipart((gateway, b"%d" % number))
    time.sleep(1.5)
    for number in range(5000):
        assert await channel.next(10) == b"%d" % number

asyncio.run(main())
"""


@contextlib.contextmanager
def pair(
    address: str, take: Callable[[bytes], bool] = lambda _: False
) -> Iterator[tuple[zmq.asyncio.Socket, ControlSocket]]:
    context = zmq.asyncio.Context.instance()
    sending, receiving = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    sending.bind(address)
    receiving.connect(sending.getsockopt_string(zmq.LAST_ENDPOINT))
    with contextlib.closing(ControlSocket(receiving, take)) as channel:
        yield sending, channel
    sending.close(0)
    receiving.close(0)


@pytest.fixture
async def ends() -> AsyncIterator[tuple[zmq.asyncio.Socket, ControlSocket]]:
    with pair("tcp://127.0.0.1:*") as made:
        yield made


async def test_messages_come_once_and_in_order(ends: tuple[zmq.asyncio.Socket, ControlSocket]) -> None:
    sending, channel = ends
    assert await channel.next(0.01) is None
    for first in range(0, COUNT, 10):  # some wait already, some are waited for
        for number in range(first, first + 10):
            await sending.send(b"%d" % number)
        for number in range(first, first + 10):
            assert await channel.next(5) == b"%d" % number
    assert await channel.next(0.01) is None


async def test_what_comes_after_the_time_is_kept(ends: tuple[zmq.asyncio.Socket, ControlSocket]) -> None:
    sending, channel = ends
    for number in range(20):
        assert await channel.next(0) is None
        await sending.send(b"%d" % number)
        while (message := await channel.next(0)) is None:
            pass
        assert message == b"%d" % number


@pytest.mark.parametrize(("size", "in_a_row"), [(3, 32), (100_000, 1)])
async def test_other_work_goes_on_while_many_wait(size: int, in_a_row: int) -> None:
    turns = itertools.count()

    async def other() -> None:
        while True:
            next(turns)
            await asyncio.sleep(0)

    with pair("inproc://many") as (sending, channel):
        for _ in range(COUNT):
            await sending.send(bytes(size))
        task = asyncio.create_task(other())
        for _ in range(COUNT):
            assert await channel.next(5) == bytes(size)
        task.cancel()
    assert next(turns) >= (COUNT - 2) // in_a_row


async def test_what_is_taken_as_it_arrives_wakes_nobody() -> None:
    taken: list[bytes] = []

    def take(body: bytes) -> bool:
        if body.startswith(b"take"):
            taken.append(body)
        return body.startswith(b"take")

    with pair("tcp://127.0.0.1:*", take) as (sending, channel):
        for body in (b"take 1", b"take 2", b"keep", b"take 3"):
            await sending.send(body)
        assert await channel.next(60) == b"keep"
        await eventually(lambda: taken == [b"take 1", b"take 2", b"take 3"])
        assert await channel.next(0) is None


async def test_a_reader_that_falls_behind_gets_all_in_the_end(ends: tuple[zmq.asyncio.Socket, ControlSocket]) -> None:
    """More than are received ahead of it: then the rest is left in the socket."""
    sending, channel = ends
    for number in range(COUNT):
        await sending.send(b"%d" % number)
    await asyncio.sleep(0.05)
    assert [await channel.next(60) for _ in range(COUNT)] == [b"%d" % number for number in range(COUNT)]


async def test_what_arrives_while_it_sends_is_received(ends: tuple[zmq.asyncio.Socket, ControlSocket]) -> None:
    """libzmq signals an arrival once; a send that comes first reads the signal."""
    sending, channel = ends
    for number in range(COUNT):
        await sending.send(b"%d" % number)
        channel.send(b"answer")
        assert await channel.next(60) == b"%d" % number
        assert await sending.recv() == b"answer"


async def test_what_arrives_while_it_looks_after_its_connection_is_received(
    ends: tuple[zmq.asyncio.Socket, ControlSocket],
) -> None:
    sending, channel = ends
    assert await channel.next(0.1) is None
    for number in range(20):
        await sending.send(b"%d" % number)
        time.sleep(0.05)  # noqa: ASYNC251 - the loop is to stand still, so that the signal waits
        assert channel.has_connection()
        assert await channel.next(60) == b"%d" % number


def test_a_connection_that_comes_about_while_it_is_closed_hangs_nothing() -> None:
    subprocess.run([sys.executable, "-c", OPENED_AND_CLOSED], check=True, timeout=100)


def test_a_gateway_that_has_not_read_for_long_reads_on() -> None:
    subprocess.run([sys.executable, "-c", NOT_READ_FOR_LONG], check=True, timeout=60)


async def test_one_that_has_long_had_more_to_read_than_it_reads_does_not_keep_up(
    ends: tuple[zmq.asyncio.Socket, ControlSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "SUBSCRIPTION_TTL_S", 0.1)
    sending, channel = ends
    assert channel.keeps_up
    for number in range(COUNT):
        await sending.send(b"%d" % number)
    await eventually(lambda: not channel.keeps_up, 60)
    for _ in range(COUNT):
        assert await channel.next(60) is not None
    assert channel.keeps_up
    await asyncio.sleep(0.2)  # that nothing comes is no delay
    assert channel.keeps_up
