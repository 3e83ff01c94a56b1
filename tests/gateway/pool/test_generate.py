"""Requests to an instance: connections that are used again, replies without end, and errors."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from ares.gateway.pool.connection import Connection
from ares.gateway.pool.delta import EngineLostError, EngineRefusedError
from ares.gateway.pool.discovery import Unusable, describe
from ares.gateway.pool.generate import EngineClient, http_client
from ares.gateway.pool.health import Status
from ares.gateway.pool.stream import Stream
from ares.gateway.tuning import DEFAULT, Tuning
from ares.protocol.messages import NewTokens, StepTokens
from tests.garbage import made_here
from tests.waiting import eventually

PIECE = b"x" * (1 << 16)
BODY: dict[str, Any] = {"request_id": "request", "token_ids": [1], "sampling_params": {}, "kv_transfer_params": {}}


class Endless:
    """An HTTP server whose replies begin with `head` and never end."""

    def __init__(self) -> None:
        self.status = 200
        self.head = b""
        self.sent = 0
        self.ended = 0
        self.port = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 %d X\r\ncontent-type: text/plain\r\n\r\n" % self.status + self.head)
            while True:
                writer.write(PIECE)
                await writer.drain()
                self.sent += len(PIECE)
        self.ended += 1
        writer.close()


@contextlib.asynccontextmanager
async def answering(status: int, length: int, body: bytes) -> AsyncIterator[EngineClient]:
    """A client of a server that answers every request so, with a length that may not be that of the body."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, length) + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server, http_client() as http:
        yield EngineClient(http, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


@pytest.fixture
async def endless() -> AsyncIterator[Endless]:
    made = Endless()
    async with await asyncio.start_server(made.answer, "127.0.0.1", 0) as server:
        made.port = server.sockets[0].getsockname()[1]
        yield made


async def refused(endless: Endless, ask: Callable[[EngineClient], Awaitable[Any]], most: int) -> None:
    """Ask, be told that the instance is lost, and check that little more was read than may be, and no more is."""
    async with http_client() as http:
        async with asyncio.timeout(60):
            with pytest.raises(EngineLostError, match=f"larger than {most} bytes"):
                await ask(EngineClient(http, f"http://127.0.0.1:{endless.port}"))
            while not endless.ended:  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0.01)
    # What is on its way in the sockets' buffers comes on top.
    assert most < endless.sent < most + (32 << 20)


async def streamed(client: EngineClient) -> None:
    stream = await client.stream(BODY)
    try:
        async for _ in stream.batches():
            pass
    finally:
        stream.close()


async def test_an_event_without_end(endless: Endless) -> None:
    endless.head = b'data: {"choices":[]}\n\ndata: '
    await refused(endless, streamed, DEFAULT.event_bytes)


async def test_a_large_event_is_still_read() -> None:
    """Of a client that was behind, with log probabilities: larger than any reply may be."""
    tokens = list(range(100_000, 800_000))
    event = b'data: {"choices":[{"token_ids":%s}]}\n\n' % str(tokens).encode()
    assert len(event) > DEFAULT.reply_bytes

    async with answering(200, len(event), event) as client:
        stream = await client.stream(BODY)
        assert [delta.token_ids async for batch in stream.batches() for delta in batch] == [tokens]


async def test_an_error_to_a_stream_without_end(endless: Endless) -> None:
    endless.status = 500
    await refused(endless, streamed, DEFAULT.reply_bytes)


@pytest.mark.parametrize("status", [200, 500])
async def test_a_reply_without_end(endless: Endless, status: int) -> None:
    endless.status = status
    await refused(endless, lambda client: client.complete(BODY), DEFAULT.reply_bytes)


async def test_an_error_that_breaks_off_is_a_loss() -> None:
    async with answering(400, 100, b"half") as client:
        for ask in (client.complete, client.stream):
            with pytest.raises(EngineLostError):
                await ask(BODY)


@pytest.mark.parametrize("reply", [b"", b"nonsense"])
async def test_a_request_that_is_given_up_is_not_sent_on(reply: bytes) -> None:
    """An instance that does not read all of it: the connection would stay open until it reads the rest."""
    body = {**BODY, "token_ids": [1_000_000_000] * 2_000_000}
    received = list[int]()
    given_up = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(reply)
        await given_up.wait()
        size = 1
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 20):
                size += len(data)
        received.append(size)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server, http_client() as http:
        client = EngineClient(http, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        asking = [asyncio.create_task(client.complete(body))]
        asking += [asyncio.create_task(client.stream(body, step_tokens=one)) for one in (False, True)]
        await asyncio.wait(asking, timeout=0.2)  # as much of it is sent as is taken
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await eventually(lambda: not client.step_streams, 60)
        given_up.set()
        await eventually(lambda: len(received) == 3, 60)
        assert max(received) < 10 * len(body["token_ids"])


class Serving:
    """An HTTP server that keeps its connections; it answers each request with a stream of one token, or half of it."""

    def __init__(self) -> None:
        self.connections = self.requests = self.broken_off = 0
        self.half = False
        self.padding = b""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
                self.requests += 1
                body = self.padding + b'data: {"choices":[{"token_ids":[%d]}]}\n\n' % self.requests
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body))
                writer.write(body[:-1] if self.half else body)
                await writer.drain()
        self.broken_off += self.half
        writer.close()


@contextlib.asynccontextmanager
async def serving(tuning: Tuning = DEFAULT) -> AsyncIterator[tuple[Serving, EngineClient]]:
    server = Serving()
    async with await asyncio.start_server(server.answer, "127.0.0.1", 0) as listening, http_client() as http:
        client = EngineClient(http, f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", tuning)
        yield server, client
        client.close()


async def tokens(stream: Stream) -> list[int]:
    return [token async for batch in stream.batches() for delta in batch for token in delta.token_ids or []]


def has_ended(stream: Stream) -> bool:
    return stream.connection is None


async def test_streams_use_the_connection_of_one_that_has_ended() -> None:
    async with serving() as (server, client):
        ended = await asyncio.gather(client.stream(BODY), client.stream(BODY))
        assert sorted([await tokens(stream) for stream in ended]) == [[1], [2]]
        streams = await asyncio.gather(client.stream(BODY), client.stream(BODY))
        for stream in ended:  # what has ended holds no connection that another has now
            stream.close()
        assert sorted([await tokens(stream) for stream in streams]) == [[3], [4]]
        assert server.connections == 2


async def test_a_stream_that_was_paused_leaves_a_connection_that_is_read() -> None:
    """One that comes whole in a read, unread, is paused as it ends."""
    async with serving(Tuning(unread_bytes=8)) as (server, client):
        server.padding = b'data: {"choices":[]}\n\n' * 100
        for number in (1, 2, 3):
            stream = await client.stream(BODY)
            await eventually(partial(has_ended, stream), 60)
            assert await tokens(stream) == [number]
        assert server.connections == 1


async def test_a_stream_that_is_closed_before_its_end_is_aborted() -> None:
    async with serving() as (server, client):
        server.half = True
        (await client.stream(BODY)).close()
        await eventually(lambda: server.broken_off, 60)
        server.half = False
        assert await tokens(await client.stream(BODY)) == [2]
        assert server.connections == 2


async def test_an_error_keeps_its_words() -> None:
    text = b'{"error": {"message": "no such model"}}'
    async with answering(404, len(text), text) as client:
        for ask in (client.complete, client.stream):
            with pytest.raises(EngineRefusedError, match=r"^no such model$"):
                await ask(BODY)


async def test_a_description_without_end(endless: Endless) -> None:
    async with http_client() as http:
        async with asyncio.timeout(4):  # its time limit would end it after 5 s
            found = await describe(http, f"http://127.0.0.1:{endless.port}")
            assert isinstance(found, Unusable)
            assert found.status is Status.NOT_AN_INSTANCE
            while not endless.ended:  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0.01)
    assert endless.sent < 32 << 20


@pytest.mark.parametrize("step_tokens", [False, True])
async def test_a_reply_leaves_nothing_to_garbage_collection(step_tokens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = [made_here(kind, monkeypatch) for kind in (Stream, Connection)]
    body = b'data: {"choices":[{"token_ids":[7],"finish_reason":"length"}]}\n\n'
    whole = b'{"choices":[{"token_ids":[7],"finish_reason":"length"}]}'
    gc.collect()
    gc.disable()
    try:
        async with answering(200, len(body), body) as client:
            stream = await client.stream(BODY, step_tokens=step_tokens)
            client.receive_step(StepTokens([NewTokens("request", 0, [7])]))
            assert [[delta.token_ids for delta in batch] async for batch in stream.batches()] == [[[7]]]
            assert list(alive[0]) == [stream]
            stream.close()
            del stream
            client.close()
            await eventually(lambda: not alive[0] and not alive[1], 60)
        async with answering(200, len(whole), whole) as client:
            delta, _ = await client.complete(BODY)
            assert delta.token_ids == [7]
            assert len(alive[1]) == 1
            client.close()
            await eventually(lambda: not alive[1], 60)
    finally:
        gc.enable()
