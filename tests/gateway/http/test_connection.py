"""Limits on a connection, through a real server: heads, idling, and readers that do not read."""

import asyncio
import contextlib
import gc
import json
import socket
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from ares.gateway.http.connection import Connection, Limits
from ares.gateway.http.responses import DirectSend, EventStream, Write
from tests.garbage import made_here
from tests.gateway.fakes import free_port
from tests.gateway.http.service import Server
from tests.waiting import eventually

CHUNK = b"x" * 10_000
GET = b"GET / HTTP/1.1\r\nHost: x\r\n"


class Endless:
    """Streams for ever, and counts what it could write and who was cancelled."""

    def __init__(self) -> None:
        self.written: dict[bytes, int] = {}
        self.ended: set[bytes] = set()
        self.left = False
        self.go = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        name = scope["path"].encode()

        async def produce(write: Write) -> None:
            try:
                if name == b"/large":
                    await write(b"x" * (64 << 20))
                while True:
                    await write(CHUNK)
                    self.written[name] = self.written.get(name, 0) + len(CHUNK)
                    await asyncio.sleep(0)
            finally:
                self.ended.add(name)

        if scope["path"] == "/until-left":
            await self.until_left(receive, send)
            return
        if scope["path"] == "/slowly":
            await self.slowly(scope, receive, send)
            return
        if scope["path"] == "/headers":
            await self.headers(scope, receive, send)
            return
        if scope["path"] == "/both":
            await self.both(scope, receive, send)
            return
        if scope["path"] == "/echo":
            await self.echo(scope, receive, send)
            return
        if scope["method"] == "POST":
            while (await receive()).get("more_body"):
                pass
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await EventStream(produce)(scope, receive, send)

    async def until_left(self, receive: Receive, send: Send) -> None:
        """Answer only when the client has left, as a long generation does."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left = True
        await send({"type": "http.response.start", "status": 499, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def slowly(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream a beginning, and the end when it is told."""

        async def produce(write: Write) -> None:
            await write(b"begun")
            await self.go.wait()
            await write(b"ended")

        await EventStream(produce)(scope, receive, send)

    async def both(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream parts that are written in one round of the event loop, at once and by the ASGI interface."""

        async def produce(write: Write) -> None:
            for n in range(4):
                assert write.now(b"at once %d, " % n)
                if n % 2:
                    await write.send({"type": "http.response.body", "body": b"sent %d, " % n, "more_body": True})
            assert write.now(b"last")

        await EventStream(produce)(scope, receive, send)

    async def headers(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream back the names of the headers as they are when the body has come."""
        while (await receive()).get("more_body"):
            pass

        async def produce(write: Write) -> None:
            await write(b", ".join(name for name, _ in scope["headers"]))

        await EventStream(produce)(scope, receive, send)

    async def echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream back the method and the body, in two parts."""
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)

        async def produce(write: Write) -> None:
            await write(scope["method"].encode() + b" ")
            await write(body)

        await EventStream(produce)(scope, receive, send)


Serve = Callable[..., Any]


@contextlib.asynccontextmanager
async def serving(**limits: Any) -> AsyncIterator[tuple[Endless, int]]:
    app, port = Endless(), free_port()
    chosen = Limits(**({"head_bytes": 4000, "idle_s": 30.0, "unread_s": 30.0} | limits))
    http: Any = partial(Connection, chosen)
    config = uvicorn.Config(DirectSend(app), port=port, http=http, lifespan="off", log_config=None)
    config.timeout_graceful_shutdown = 1
    server = Server(config)
    task = asyncio.create_task(server.serve())
    await eventually(lambda: server.started, 20)
    yield app, port
    server.should_exit = True
    await task


async def reply(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the server hangs up."""
    with contextlib.suppress(ConnectionResetError):
        return await asyncio.wait_for(reader.read(-1), 30)
    return b""


@pytest.mark.parametrize(
    "head",
    [
        GET + b"a: " + b"x" * 5000 + b"\r\n\r\n",
        GET + b"a: " + b"x" * 5000,  # a header that never ends
        GET + b"a: b\r\n" * 1000,
        b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_a_large_head_is_refused(head: bytes) -> None:
    async with serving() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        answer = await reply(reader)
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert "4000 bytes" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        writer.close()


WHOLE = b"Content-Length: 11\r\n\r\nhello world"
CHUNKED_POST = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "rest",
    [
        b"0\r\na: " + b"x" * 5000,  # a field that never ends
        b"0\r\na: " + b"x" * 5000 + b"\r\n\r\n",
        b"0\r\n" + b"a: b\r\n" * 2500 + b"\r\n",
        b"1;" + b"x" * 5000,
    ],
)
async def test_large_fields_behind_a_chunked_body_are_refused(rest: bytes) -> None:
    async with serving() as (_, port):
        for body in (b"", b"5\r\nhello\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(CHUNKED_POST + body)
            await asyncio.sleep(0.05)
            writer.write(rest)
            assert (await reply(reader)).startswith(b"HTTP/1.1 431 ")
            writer.close()


async def test_fields_behind_a_chunked_body_are_no_headers() -> None:
    async with serving() as (_, port):
        request = b"POST /headers HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert await echoes(port, request + b"5\r\nhello\r\n0\r\na: b\r\n\r\n") == [b"host, transfer-encoding"]


async def test_a_large_chunked_body_is_not_taken_for_a_large_head() -> None:
    async with serving() as (_, port):
        filler = b"a: " + b"x" * 3000 + b"\r\n"
        head = CHUNKED_POST.replace(b"/ HTTP", b"/echo HTTP").replace(b"\r\n\r\n", b"\r\n" + filler + b"\r\n")
        chunk = b"2000\r\n" + b"y" * 0x2000 + b"\r\n"
        assert await echoes(port, head, *[chunk] * 20, b"0\r\n\r\n") == [b"POST " + b"y" * 0x2000 * 20]
        assert await echoes(port, head + chunk * 20 + b"0\r\n\r\n") == [b"POST " + b"y" * 0x2000 * 20]


async def test_what_is_no_request_is_refused_in_the_usual_form() -> None:
    async with serving() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x16\x03\x01 nonsense\r\n\r\n")
        answer = await reply(reader)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
        writer.close()


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        (b"GARBAGE\r\n\r\n", b"400"),
        (GET + b"a: " + b"x" * 5000, b"431"),
        (GET + b"a: b\r\n" * 1000, b"431"),
        (CHUNKED_POST + b"zz\r\n", b"400"),
        (CHUNKED_POST + b"5\r\nhello\r\n0\r\na: " + b"x" * 5000 + b"\r\nb: c\r\n", b"431"),
    ],
)
@pytest.mark.parametrize("more", [b"", b"x" * 10_000])
async def test_what_is_no_request_is_refused_behind_the_replies_to_those_before_it(
    wrong: bytes, status: bytes, more: bytes
) -> None:
    async with serving() as (app, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /slowly HTTP/1.1\r\nHost: x\r\n" + WHOLE)
        await reader.readuntil(b"begun")
        writer.write(wrong)
        await asyncio.sleep(0.05)
        writer.write(more)
        await asyncio.sleep(0.05)
        app.go.set()
        answer = await reply(reader)
        first, _, second = answer.partition(b"\r\n0\r\n\r\n")
        assert first == b"\r\n5\r\nended"
        assert second.startswith(b"HTTP/1.1 " + status)
        assert second.count(b"HTTP/1.1 4") == 1
        writer.close()


async def test_a_reply_that_has_begun_is_not_broken_by_a_refusal() -> None:
    async with serving() as (app, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        # It is answered before its body has come.
        writer.write(b"GET /early HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        await reader.readuntil(b"xxx")
        writer.write(b"zz\r\n")
        rest = await reply(reader)
        assert b"HTTP/1.1" not in rest
        await eventually(lambda: b"/early" in app.ended, 10)
        writer.close()


async def test_one_connection_takes_many_heads_below_the_limit() -> None:
    async with serving() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(5):
            writer.write(
                b"POST / HTTP/1.1\r\nHost: x\r\na: " + b"x" * 3000 + b"\r\nContent-Length: 9000\r\n\r\n" + b"y" * 9000
            )
            assert b" 204 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        writer.close()


@pytest.mark.parametrize(
    "beginning", [b"", b"GET / HT", GET, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf"]
)
async def test_whoever_does_not_go_on_is_cut_off(beginning: bytes) -> None:
    async with serving(idle_s=0.3) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(beginning)
        assert await reply(reader) == b""
        writer.close()


async def test_a_request_behind_another_one_in_the_same_read_has_to_go_on_too() -> None:
    async with serving(idle_s=0.3) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        first = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        writer.write(first + b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        assert (await reply(reader)).count(b" 204 ") == 1
        writer.close()


async def test_a_request_that_waits_behind_a_stream_does_not_end_it() -> None:
    async with serving(idle_s=0.2) as (app, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /slowly HTTP/1.1\r\nHost: x\r\n" + WHOLE)
        await reader.readuntil(b"begun")
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        await asyncio.sleep(0.05)
        writer.write(b"x" * 5)  # uvicorn reads no further meanwhile
        await asyncio.sleep(0.7)
        app.go.set()
        await asyncio.wait_for(reader.readuntil(b"ended\r\n0\r\n\r\n"), 30)
        writer.write(b"x" * 5)
        assert b" 204 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        writer.close()


async def test_requests_that_wait_on_one_connection_are_bounded() -> None:
    async with serving() as (app, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        first = b"POST /slowly HTTP/1.1\r\nHost: x\r\n" + WHOLE
        writer.write(first + b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" * 2000)
        await reader.readuntil(b"begun")
        app.go.set()
        answer = await reply(reader)
        assert answer.count(b" 204 ") == 63
        assert b"64 requests of this connection wait for their answers already" in answer.rpartition(b" 204 ")[2]
        writer.close()


async def test_many_small_parts_of_a_body_cost_no_timer_each(monkeypatch: pytest.MonkeyPatch) -> None:
    timers = 0
    later = asyncio.get_running_loop().call_later

    def counted(*arguments: Any, **keywords: Any) -> asyncio.TimerHandle:
        nonlocal timers
        timers += 1
        return later(*arguments, **keywords)

    async with serving() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", counted)
        writer.write(CHUNKED_POST + b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n")
        assert b" 204 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        monkeypatch.undo()
        assert timers < 100
        writer.close()


async def test_a_reader_that_does_not_read_is_held_back_and_cut_off_and_stalls_nobody() -> None:
    async with serving(unread_s=1.0) as (app, port):
        _, slow = await asyncio.open_connection("127.0.0.1", port, limit=1000)
        slow.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\n")
        read = 0
        async with asyncio.timeout(50):
            while b"/slow" not in app.ended or read < 1_000_000:
                read += len(await reader.read(1 << 16))
        # Nothing but what the kernel's socket buffers take.
        assert app.written[b"/slow"] < 32 << 20
        assert b"/quick" not in app.ended
        writer.close()
        slow.close()


async def test_a_slow_reader_that_reads_is_not_cut_off() -> None:
    async with serving(unread_s=5.0, idle_s=0.5) as (app, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /steady HTTP/1.1\r\nHost: x\r\n\r\n")
        for _ in range(20):
            await asyncio.sleep(0.1)
            assert await reader.read(1 << 16)
        assert b"/steady" not in app.ended
        writer.close()
        await eventually(lambda: b"/steady" in app.ended, 30)


async def test_a_reader_that_never_catches_up_is_not_cut_off() -> None:
    async with serving(unread_s=1.0) as (app, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 12)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        until = asyncio.get_running_loop().time() + 3.0
        while asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.05)
            assert await reader.read(1 << 16)
        assert b"/large" not in app.ended
        writer.close()
        await eventually(lambda: b"/large" in app.ended, 30)


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
WEBSOCKET = b"Upgrade: websocket\r\nSec-WebSocket-Key: AAEAAEAAAAIAAAABAAMAAA==\r\nConnection: keep-alive, Upgrade\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n6\r\nhello \r\n5\r\nworld\r\n0\r\n\r\n"


async def echoes(port: int, *pieces: bytes, count: int = 1) -> list[bytes]:
    """Send pieces on one connection, and return what is in the chunks of so many replies."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.02)
    bodies = []
    for _ in range(count):
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        assert head.startswith(b"HTTP/1.1 200 "), head
        body = b""
        while size := int(await asyncio.wait_for(reader.readuntil(b"\r\n"), 60), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
        bodies.append(body)
    writer.close()
    return bodies


@pytest.mark.parametrize("headers", [H2C, WEBSOCKET, b"Upgrade: TLS/1.3\r\nConnection: upgrade\r\n", H2C + WEBSOCKET])
@pytest.mark.parametrize("rest", [WHOLE, CHUNKED])
async def test_a_request_that_offers_another_protocol_keeps_its_body(headers: bytes, rest: bytes) -> None:
    async with serving() as (_, port):
        request = b"POST /echo HTTP/1.1\r\nHost: x\r\n" + headers + rest
        assert await echoes(port, request) == [b"POST hello world"]
        cut = request.index(b"\r\n\r\n") + 4
        for at in (20, len(request) - len(rest) - 5, cut - 2, cut, cut + 4, len(request) - 1):
            assert await echoes(port, request[:at], request[at:]) == [b"POST hello world"], at
        after = b"GET /echo HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n"
        wanted = [b"POST hello world", b"GET ", b"POST hello world", b"GET "]
        assert await echoes(port, request + after + request + after, count=4) == wanted


async def test_the_last_request_of_a_connection_may_offer_another_protocol() -> None:
    async with serving() as (_, port):
        request = b"POST /echo HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: close, Upgrade\r\n" + WHOLE
        assert await echoes(port, request) == [b"POST hello world"]


async def test_a_head_that_offers_another_protocol_is_counted_once_and_its_body_awaited() -> None:
    head = b"POST /echo HTTP/1.1\r\nHost: x\r\n" + H2C
    async with serving(head_bytes=4000, idle_s=0.3) as (_, port):
        filler = b"a: " + b"x" * 3000 + b"\r\n"
        assert await echoes(port, head + filler + WHOLE) == [b"POST hello world"]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + filler * 2 + WHOLE)
        assert (await reply(reader)).startswith(b"HTTP/1.1 431 ")
        writer.close()
        for rest in (b"Content-Length: 11\r\n\r\n", b"Content-Length: 11\r\n\r\nhello"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + rest)
            assert await reply(reader) == b""
            writer.close()


async def test_a_tunnel_is_not_opened() -> None:
    async with serving() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reply(reader)).startswith(b"HTTP/1.1 400 ")
        writer.close()


@pytest.mark.parametrize("version", [b"0.9", b"1.0"])
@pytest.mark.parametrize("headers", [b"", b"Connection: keep-alive\r\n", H2C])
async def test_an_older_client_is_sent_no_chunks(version: bytes, headers: bytes) -> None:
    async with serving() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /echo HTTP/" + version + b"\r\n" + headers + WHOLE)
        head, _, body = (await reply(reader)).partition(b"\r\n\r\n")
        assert body == b"POST hello world"
        assert b"transfer-encoding" not in head.lower()
        writer.close()


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi", "Content-Length"),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", "header"),
        (b"GETTY / HTTP/1.1\r\n\r\n", "method"),
        (b"GET / HTTP/1.7\r\n\r\n", "HTTP version"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "chunk"),
    ],
)
async def test_a_malformed_request_is_refused_with_the_reason(request_: bytes, reason: str) -> None:
    async with serving() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_)
        answer = await reply(reader)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert reason in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        writer.close()


async def test_a_client_that_closes_only_its_own_side_gets_what_is_answered_at_once() -> None:
    post = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
    async with serving() as (_, port):
        for requests in (post, post + post, H2C_POST):
            answer = await answer_to_half_closed(port, requests)
            assert answer.count(b"HTTP/1.1 204 ") == requests.count(b"POST"), answer
        # What would wait for long is cancelled, as where the client has left.
        until_left = b"POST /until-left HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
        assert (await answer_to_half_closed(port, until_left)).startswith(b"HTTP/1.1 499 ")
        # And what is not complete is not answered.
        assert await answer_to_half_closed(port, post[:-1]) == b""
        assert await answer_to_half_closed(port, b"") == b""


async def test_a_client_that_closes_its_side_of_a_stream_has_left(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as (app, port):
        await answer_to_half_closed(port, b"GET /at-once HTTP/1.1\r\nHost: x\r\n\r\n")
        await eventually(lambda: b"/at-once" in app.ended, 10)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /later HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"xxx")
        writer.write_eof()
        await eventually(lambda: b"/later" in app.ended, 10)
        writer.close()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("behind", [GET + b"\r\n", (GET + b"\r\n") * 3, GET])
async def test_a_client_that_leaves_a_stream_with_requests_behind_it(
    behind: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as (app, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /first HTTP/1.1\r\nHost: x\r\n\r\n" + behind)
        await eventually(lambda: b"/first" in app.written, 10)
        writer.close()
        await eventually(lambda: b"/first" in app.ended, 10)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /until-left HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" + behind)
        await asyncio.sleep(0.1)
        writer.close()
        await eventually(lambda: app.left, 10)
        await eventually(lambda: set(app.written) <= app.ended, 10)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


H2C_POST = b"POST / HTTP/1.1\r\nHost: x\r\n" + H2C + b"Content-Length: 5\r\n\r\nhello"


async def answer_to_half_closed(port: int, requests: bytes) -> bytes:
    """Send requests, close the sending side, and return all that comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(requests)
    writer.write_eof()
    answer = await reply(reader)
    writer.close()
    return answer


async def test_parts_of_one_round_arrive_in_order() -> None:
    async with serving() as (_, port):
        parts = [b"at once 0, at once 1, ", b"sent 1, ", b"at once 2, at once 3, ", b"sent 3, ", b"last"]
        assert await echoes(port, GET.replace(b"/ HTTP", b"/both HTTP") + b"Connection: close\r\n\r\n") == [
            b"".join(parts)
        ]


async def test_requests_leave_nothing_to_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    running = made_here(RequestResponseCycle, monkeypatch)
    gc.collect()
    gc.disable()
    try:
        async with serving() as (app, port):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(GET.replace(b"/ HTTP", b"/left HTTP") + b"\r\n")
            await eventually(lambda: b"/left" in app.written, 60)
            assert running
            writer.close()
            await eventually(lambda: b"/left" in app.ended and not running, 60)
            assert await echoes(port, b"POST /echo HTTP/1.1\r\nHost: x\r\n" + WHOLE) == [b"POST hello world"]
            await eventually(lambda: not running, 60)
    finally:
        gc.enable()
