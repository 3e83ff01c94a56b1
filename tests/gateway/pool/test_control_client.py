"""Commands to an instance over its control channel."""

import asyncio

import pytest
import zmq
import zmq.asyncio

from ares.gateway.pool.channel import ControlSocket
from ares.gateway.pool.generate import http_client
from ares.gateway.pool.instance import Instance
from ares.protocol import messages


async def test_commands_to_a_lost_instance_do_not_block() -> None:
    """ZeroMQ queues for a peer that is gone; when the queue is full, a gateway must not wait for it."""
    async with http_client() as http:
        instance = Instance("http://127.0.0.1:1", http, 0.1)
        socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 1)
        socket.connect("tcp://127.0.0.1:1")
        channel = ControlSocket(socket)
        instance.control.attach(channel)
        try:
            async with asyncio.timeout(60):
                for _ in range(5):
                    await instance.control.release("key")
                with pytest.raises(TimeoutError):
                    await instance.control.cut("key", 0.05)
        finally:
            channel.close()
            socket.close()


@pytest.mark.parametrize("turns", range(3))
async def test_a_wait_that_is_cancelled_as_its_report_comes_stays_cancelled(turns: int) -> None:
    """`asyncio.wait_for` of Python 3.11 returns the report and drops the cancellation: what waits would run on."""
    async with http_client() as http:
        control = Instance("http://127.0.0.1:1", http, 0.1).control
        waiting = asyncio.create_task(control.until_kv_received("key", 30))
        await asyncio.sleep(0)
        await control.on_kv_received(messages.KvReceived("key", 3, False))
        for _ in range(turns):
            await asyncio.sleep(0)
        cancelled = waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled() is cancelled
