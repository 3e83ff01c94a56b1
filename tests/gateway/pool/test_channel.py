"""Messages of a socket: each once and in order, whether they wait already or are waited for."""

import asyncio
import contextlib
import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest
import zmq
import zmq.asyncio

from ares.gateway.pool.channel import Inbox

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


@contextlib.contextmanager
def pair(address: str) -> Iterator[tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]]:
    context = zmq.asyncio.Context.instance()
    sending, receiving = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    sending.bind(address)
    receiving.connect(sending.getsockopt_string(zmq.LAST_ENDPOINT))
    yield sending, receiving
    sending.close(0)
    receiving.close(0)


@pytest.fixture
def ends() -> Iterator[tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]]:
    with pair("tcp://127.0.0.1:*") as made:
        yield made


async def test_messages_come_once_and_in_order(ends: tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]) -> None:
    sending, receiving = ends
    inbox = Inbox(receiving)
    assert await inbox.next(0.01) is None
    for first in range(0, COUNT, 10):  # some wait already, some are waited for
        for number in range(first, first + 10):
            await sending.send(b"%d" % number)
        for number in range(first, first + 10):
            assert await inbox.next(5) == b"%d" % number
    assert await inbox.next(0.01) is None


async def test_what_comes_after_the_time_is_kept(ends: tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]) -> None:
    sending, receiving = ends
    inbox = Inbox(receiving)
    for number in range(20):
        assert await inbox.next(0) is None
        await sending.send(b"%d" % number)
        while (message := await inbox.next(0)) is None:
            pass
        assert message == b"%d" % number


@pytest.mark.parametrize(("size", "in_a_row"), [(3, 32), (100_000, 1)])
async def test_other_work_goes_on_while_many_wait(size: int, in_a_row: int) -> None:
    turns = itertools.count()

    async def other() -> None:
        while True:
            next(turns)
            await asyncio.sleep(0)

    with pair("inproc://many") as (sending, receiving):
        inbox = Inbox(receiving)
        for _ in range(COUNT):
            await sending.send(bytes(size))
        task = asyncio.create_task(other())
        for _ in range(COUNT):
            assert await inbox.next(5) == bytes(size)
        task.cancel()
    assert next(turns) >= (COUNT - 2) // in_a_row


def test_a_connection_that_comes_about_while_it_is_closed_hangs_nothing() -> None:
    subprocess.run([sys.executable, "-c", OPENED_AND_CLOSED], check=True, timeout=100)
