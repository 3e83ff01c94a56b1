"""Connections that carry one request after the other: what is used again, and what is not."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from ares.gateway.pool.connection import BrokenReplyError, Connection
from ares.gateway.pool.connections import Connections
from ares.gateway.pool.whole_reply import WholeReply
from ares.gateway.tuning import DEFAULT, Tuning
from tests.waiting import eventually

REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Server:
    """Answers every request with `reply`, in pieces; an empty one closes the connection."""

    def __init__(self) -> None:
        self.reply: list[bytes] = [OK]
        self.connections = self.ended = 0
        self.writers: list[asyncio.StreamWriter] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                for piece in self.reply:
                    if not piece:
                        writer.close()
                    writer.write(piece)
                    await writer.drain()
        self.ended += 1
        writer.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    async with await asyncio.start_server(made.serve, "127.0.0.1", 0) as listening:
        made.port = listening.sockets[0].getsockname()[1]
        yield made


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Connections]:
    made = Connections("127.0.0.1", server.port, None)
    yield made
    made.close()


async def ask(client: Connections) -> tuple[int, bytes]:
    reply = await client.send(REQUEST, lambda: WholeReply(DEFAULT.reply_bytes))
    return reply.ready.result(), reply.body


async def test_a_connection_is_used_again(server: Server, client: Connections) -> None:
    for _ in range(3):
        assert await ask(client) == (200, b"ok")
    assert server.connections == 1


async def test_requests_at_the_same_time_have_connections_of_their_own(server: Server, client: Connections) -> None:
    assert await asyncio.gather(*(ask(client) for _ in range(3))) == [(200, b"ok")] * 3
    assert server.connections == 3
    await ask(client)
    assert server.connections == 3


async def test_at_most_so_many_are_kept(server: Server) -> None:
    client = Connections("127.0.0.1", server.port, None, Tuning(kept_connections=2))
    await asyncio.gather(*(ask(client) for _ in range(3)))
    await asyncio.gather(*(ask(client) for _ in range(3)))
    client.close()
    assert server.connections == 4


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
)
async def test_a_server_that_does_not_keep_it(server: Server, client: Connections, reply: bytes) -> None:
    server.reply = [reply]
    for _ in range(2):
        assert await ask(client) == (200, b"ok")
    assert server.connections == 2


async def test_one_that_was_idle_for_long_is_not_used(server: Server) -> None:
    client = Connections("127.0.0.1", server.port, None, Tuning(kept_connection_s=-1.0))
    for _ in range(2):
        await ask(client)
    client.close()
    assert server.connections == 2


async def test_those_that_are_idle_for_long_are_closed(server: Server) -> None:
    client = Connections("127.0.0.1", server.port, None, Tuning(kept_connection_s=0.3))
    await asyncio.gather(*(ask(client) for _ in range(3)))
    assert server.connections == 3
    await eventually(lambda: server.ended == 3, 30)
    assert await ask(client) == (200, b"ok")
    client.close()


async def test_one_that_was_in_use_when_all_were_closed_is_closed_when_it_was_idle_for_long(server: Server) -> None:
    client = Connections("127.0.0.1", server.port, None, Tuning(kept_connection_s=0.3))
    await ask(client)
    server.reply = []
    asked = asyncio.create_task(ask(client))  # over the first connection
    await asyncio.sleep(0)
    client.close()
    server.writers[0].write(OK)
    assert await asked == (200, b"ok")
    await eventually(lambda: server.ended == 1, 30)
    assert server.connections == 1


async def test_one_that_the_server_has_closed_is_not_used(
    server: Server, client: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = asyncio.Event()
    own = Connection.connection_lost

    def noted(connection: Connection, error: Exception | None) -> None:
        own(connection, error)
        lost.set()

    monkeypatch.setattr(Connection, "connection_lost", noted)
    await ask(client)
    server.writers[0].close()
    async with asyncio.timeout(30):
        await lost.wait()
    assert await ask(client) == (200, b"ok")
    assert server.connections == 2


async def test_one_that_the_server_closes_as_it_is_used_again_is_replaced(server: Server, client: Connections) -> None:
    """An idle connection may be closed while a request is on its way: nobody has read that."""
    await ask(client)
    server.writers[0].close()
    assert await ask(client) == (200, b"ok")
    assert server.connections == 2


async def test_a_reply_in_pieces_after_one_that_announces_it(server: Server, client: Connections) -> None:
    chunks = b"2\r\nno\r\n3\r\nne!\r\n0\r\n\r\n"
    whole = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 No\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    server.reply = [whole[n : n + 1] for n in range(len(whole))]
    for _ in range(2):
        assert await ask(client) == (404, b"none!")
    assert server.connections == 1


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ([b""], "the connection was closed"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok", b""], "the connection was closed"),
        ([b"SSH-2.0-x\r\n"], "not a reply of HTTP"),
    ],
)
async def test_no_whole_reply(server: Server, client: Connections, reply: list[bytes], why: str) -> None:
    server.reply = reply
    with pytest.raises(BrokenReplyError, match=why):
        await ask(client)
    server.reply = [OK]
    assert await ask(client) == (200, b"ok")


async def test_what_is_given_up_is_closed(server: Server, client: Connections) -> None:
    server.reply = []
    asked = asyncio.create_task(ask(client))
    async with asyncio.timeout(30):
        while not server.connections:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.01)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        while not server.ended:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.01)


async def test_nobody_listens() -> None:
    with pytest.raises(ConnectionRefusedError):
        await ask(Connections("127.0.0.1", 1, None))


@pytest.mark.parametrize(
    "more", [OK, b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nstale!", b"HTTP/1.1 200 OK\r\nX: ", b"x"]
)
async def test_one_with_more_than_a_reply_is_not_used_again(server: Server, client: Connections, more: bytes) -> None:
    """What came without being asked for must not become the answer to another request."""
    server.reply = [OK + more]
    assert await ask(client) == (200, b"ok")
    server.reply = [b"HTTP/1.1 404 No\r\nContent-Length: 4\r\n\r\nnone"]
    assert await ask(client) == (404, b"none")
    assert server.connections == 2
