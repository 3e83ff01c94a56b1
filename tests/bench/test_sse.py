"""Streams are read whole, however they are cut into reads, and what ends them otherwise is an error."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from ares.bench import sse

EVENTS = [
    b'data: {"choices":[{"index":0,"token_ids":[7]}]}\n\n',
    b": a comment\n\n",
    b'data: {"choices":[{"index":1,"token_ids":[8,9]},{"index":0,"text":""}],"more":1}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":3}}\n\n',
]
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ERROR = b'data: {"error":{"message":"no more memory"}}\n\n'


def chunked(*events: bytes) -> bytes:
    return HEAD + b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"


@asynccontextmanager
async def served(reply: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[int]:
    """Answer every request by `reply`, and keep its connection."""
    stop = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reply(writer)
        await writer.drain()
        waiting = asyncio.ensure_future(stop.wait())
        await asyncio.wait((waiting, asyncio.ensure_future(reader.read())), return_when=asyncio.FIRST_COMPLETED)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        stop.set()
        server.close()


def bytewise(data: bytes) -> Callable[[asyncio.StreamWriter], Awaitable[None]]:
    async def reply(writer: asyncio.StreamWriter) -> None:
        for n in range(0, len(data), 3):
            writer.write(data[n : n + 3])
            await asyncio.sleep(0)

    return reply


async def tokens(port: int) -> list[list[int]]:
    async with sse.session() as http, sse.open_stream(http, f"http://127.0.0.1:{port}/", {}, "r-1") as chunks:
        return [chunk.tokens async for chunk in chunks]


async def test_events_are_decoded_as_they_come() -> None:
    async with served(bytewise(chunked(*EVENTS, DONE))) as port:
        assert await tokens(port) == [[7], [8, 9], []]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (chunked(EVENTS[0], ERROR, DONE), "no more memory"),
        (b"HTTP/1.1 503 Busy\r\ncontent-length: 8\r\n\r\ntoo busy", "503: too busy"),
    ],
)
async def test_errors_of_a_stream_are_raised(reply: bytes, message: str) -> None:
    async with served(bytewise(reply)) as port:
        with pytest.raises(sse.StreamError, match=message):
            await tokens(port)


async def test_leaving_a_stream_closes_its_connection() -> None:
    left = asyncio.Event()

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        try:
            while True:
                writer.write(chunked(EVENTS[0])[len(HEAD) : -5])
                await writer.drain()
                await asyncio.sleep(0.01)
        except ConnectionError:
            left.set()

    async with served(endless) as port, sse.session() as http:
        async with sse.open_stream(http, f"http://127.0.0.1:{port}/", {}) as chunks:
            async for _ in chunks:
                break
        await asyncio.wait_for(left.wait(), 60)


async def test_raw_replies_are_read_at_once_and_decoded_afterwards() -> None:
    async with served(bytewise(chunked(*EVENTS, DONE))) as port:
        replies = await sse.read_at_once([sse.request_bytes("/", {})] * 3, [port], 10)
    for reply in replies:
        assert (reply.status, reply.complete) == (200, True)
        assert [chunk.tokens for chunk in reply.chunks()] == [[7], [8, 9], []]
        assert [chunk.usage for chunk in reply.chunks()][-1] == sse.Usage(4, 3)
        # Also where the two ends of a line came in two reads.
        assert sum(count for _, count in reply.events_of_reads()) == len(EVENTS) + 1


async def test_a_raw_reply_that_is_cut_off_is_not_complete() -> None:
    async def cut(writer: asyncio.StreamWriter) -> None:
        writer.write(chunked(*EVENTS, DONE)[: len(HEAD) + 70])
        await writer.drain()
        writer.close()

    async with served(cut) as port:
        (reply,) = await sse.read_at_once([sse.request_bytes("/", {})], [port], 10)
    assert (reply.status, reply.complete) == (200, False)
    assert [chunk.tokens for chunk in reply.chunks()] == [[7]]


async def test_a_head_that_ends_like_a_stream_does_not_end_it() -> None:
    async def slow(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(b'{"choices":[{},{}]}\n')
        await writer.drain()
        writer.close()

    async with served(slow) as port:
        (reply,) = await sse.read_at_once([sse.request_bytes("/", {})], [port], 10)
    assert len(sse.decode(reply.body()).choices) == 2


async def test_what_is_not_answered_is_a_broken_stream() -> None:
    async def silent(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)

    async with served(silent) as port:
        with pytest.raises(sse.StreamError, match=r"2 of 2 replies took longer than 0\.2 s"):
            await sse.read_at_once([sse.request_bytes("/", {})] * 2, [port], 0.2)
    with pytest.raises(sse.StreamError, match="no connection"):
        await sse.read_at_once([sse.request_bytes("/", {})], [port], 10)


@pytest.mark.parametrize("texts", [["one", "two"], ["one", "one"]])
async def test_texts_are_compared_however_chunks_cut_them(texts: list[str]) -> None:
    replies = []
    for number, text in enumerate(texts):
        events = b"".join(b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % part.encode() for part in text)
        size = 7 + 20 * number
        parts = [events[n : n + size] for n in range(0, len(events), size)]
        async with served(bytewise(chunked(*parts, DONE))) as port:
            replies += await sse.read_at_once([sse.request_bytes("/", {})], [port], 60)
    assert [reply.text() for reply in replies] == texts
    if len(set(texts)) == 1:
        sse.check_same_text(replies)
    else:
        with pytest.raises(sse.StreamError, match="different texts"):
            sse.check_same_text(replies)
