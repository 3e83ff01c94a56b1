"""The data channel to an instance: vLLM's token-level API (`POST /inference/v1/generate`, vLLM 0.32)."""

import asyncio
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any, cast

import aiohttp
import httptools
import msgspec

from ares.gateway.tuning import DEFAULT, Tuning
from ares.protocol.fields import GENERATE_ROUTE, REPETITION, REPETITION_DETECTED


class EngineLostError(Exception):
    """The instance cannot be reached, or its stream broke."""


class EngineRefusedError(Exception):
    """The instance answered with an error; `status` is its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class TokenLogprob(msgspec.Struct):
    """One candidate token: its id and log probability."""

    token_id: int
    logprob: float


class PositionLogprobs(TokenLogprob):
    """The sampled token of one position and the candidates that were asked for."""

    top_logprobs: list[TokenLogprob] = []


class Logprobs(msgspec.Struct):
    """Log probabilities, one entry a token."""

    content: list[PositionLogprobs] | None = None


class Delta(msgspec.Struct):
    """New tokens of a stream, and why it ended if it did."""

    token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: Logprobs | None = None

    def name_repetition(self) -> None:
        """Set the finish reason of an output that repeats itself, which an instance ends by the limit of a cut."""
        if self.stop_reason == REPETITION_DETECTED:
            self.finish_reason = REPETITION


class _Chunk(msgspec.Struct):
    choices: list[Delta] = []
    error: dict[str, Any] | None = None


class _Reply(msgspec.Struct):
    choices: list[Delta]
    kv_transfer_params: dict[str, Any] | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_reply = msgspec.json.Decoder(_Reply).decode
_encode = msgspec.json.Encoder().encode
# Errors of bytes that no engine sends: no JSON, no UTF-8, an error whose code is no number, endless nesting.
_MALFORMED = (msgspec.DecodeError, TypeError, ValueError, RecursionError)
_JSON_HEADERS = {"Content-Type": "application/json"}


async def whole_body(reply: aiohttp.ClientResponse, most: int) -> bytes:
    """Return the body of a reply; ValueError where it has more than so many bytes."""
    parts, size = [], 0
    async for part in reply.content.iter_any():
        size += len(part)
        if size > most:
            raise ValueError(f"the reply is larger than {most} bytes")
        parts.append(part)
    return b"".join(parts)


def http_client(api_key: str | None = None, tuning: Tuning = DEFAULT) -> aiohttp.ClientSession:
    """Make the HTTP client that a gateway uses; streams take only its key."""
    return aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=tuning.connect_s),
        auto_decompress=False,
    )


class Stream(asyncio.Protocol):
    """An open generation on an instance, on a connection of its own. Close it to abort the generation.

    In serving, a read brings one token, and the overhead of a general HTTP client for each read would exceed all other
    work for the token. httptools parses HTTP; its callbacks are the public methods below.
    """

    def __init__(self, tuning: Tuning = DEFAULT) -> None:
        self._tuning = tuning
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._received: list[bytes] = []
        self._unread = 0
        self._arrival: asyncio.Future[None] | None = None
        self._complete = False
        self._lost: Exception | None = None

    @property
    def starved(self) -> bool:
        """Whether its reader waits for data."""
        return self._arrival is not None and not self._arrival.done()

    async def batches(self) -> AsyncIterator[list[Delta]]:
        """Yield the new tokens of each read.

        Raises
        ------
        EngineLostError
            The connection broke before the stream ended.
        EngineRefusedError
            The engine failed the request.
        """
        left = b""
        try:
            while data := await self._read():
                *events, left = (left + data).split(b"\n\n")
                if len(left) > self._tuning.event_bytes:
                    raise ValueError(f"an event is larger than {self._tuning.event_bytes} bytes")
                batch = []
                for event in events:
                    if event == b"data: [DONE]":
                        continue
                    chunk = _decode_chunk(event[6:])
                    if chunk.error is not None:
                        raise EngineRefusedError(
                            int(chunk.error.get("code") or 500), str(chunk.error.get("message", "the engine failed"))
                        )
                    batch += chunk.choices
                if batch:
                    yield batch
        except _MALFORMED as error:
            raise EngineLostError(f"the stream broke: {error!r}") from error

    async def text(self) -> str:
        """Return the rest of the reply; EngineLostError where it is too large, or breaks off."""
        parts, size = [], 0
        while data := await self._read():
            size += len(data)
            if size > self._tuning.reply_bytes:
                raise EngineLostError(f"the reply is larger than {self._tuning.reply_bytes} bytes")
            parts.append(data)
        return b"".join(parts).decode(errors="replace")

    def send(self, request: bytes) -> None:
        """Send a request; `status` is set when its reply begins."""
        self._transport.write(request)

    def close(self) -> None:
        """Close the connection: the engine aborts what still runs."""
        self._transport.close()

    async def _read(self) -> bytes:
        """Return the data that has arrived, or wait for some; empty at the end."""
        while not self._received:
            if self._complete:
                return b""
            if self._lost is not None:
                raise EngineLostError(f"the stream broke: {self._lost!r}") from self._lost
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        data = b"".join(self._received)
        self._received.clear()
        if self._unread > self._tuning.unread_bytes:
            self._transport.resume_reading()
        self._unread = 0
        return data

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    # --- asyncio calls these ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Parse new data."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._lose(error)
            self._transport.close()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Record why the stream broke, if it had not ended."""
        self._lose(exc or ConnectionResetError("the connection was closed"))
        self._wake()

    def _lose(self, error: Exception) -> None:
        self._lost = self._lost or error
        if not self.status.done():
            self.status.set_exception(EngineLostError(f"no reply: {error!r}"))
            self.status.exception()  # it may never be asked for

    # --- httptools calls these ---

    def on_headers_complete(self) -> None:
        """Set the status."""
        status = self._parser.get_status_code()
        if status >= 200 and not self.status.done():
            self.status.set_result(status)

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body, and pause the engine when too much is unread."""
        self._received.append(body)
        before = self._unread
        self._unread += len(body)
        if before <= self._tuning.unread_bytes < self._unread:
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """Note the end of the reply."""
        self._complete = self.status.done()


class EngineClient:
    """Token-level requests to one instance."""

    def __init__(self, http: aiohttp.ClientSession, url: str, tuning: Tuning = DEFAULT) -> None:
        self._http = http
        self._tuning = tuning
        self._generate = url + GENERATE_ROUTE
        parts = urllib.parse.urlsplit(self._generate)
        self._tls = parts.scheme == "https" or None
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._tls else 80)
        head = {"Host": parts.netloc, "Content-Type": "application/json", **http.headers, "Content-Length": ""}
        lines = [f"POST {parts.path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
        self._stream_head = "\r\n".join(lines).encode()

    async def stream(self, body: dict[str, Any]) -> Stream:
        """Start a streaming generation; returns when the engine has accepted it."""
        data = _encode({**body, "stream": True})
        try:
            async with asyncio.timeout(self._tuning.connect_s):
                _, stream = await asyncio.get_running_loop().create_connection(
                    lambda: Stream(self._tuning), self._host, self._port, ssl=self._tls
                )
        except OSError as error:  # a timeout is one too
            raise EngineLostError(f"no connection: {error!r}") from error
        try:
            stream.send(b"%s%d\r\n\r\n%s" % (self._stream_head, len(data), data))
            status = await stream.status
            if status != 200:
                raise EngineRefusedError(status, _message(await stream.text()))
        except BaseException:
            stream.close()
            raise
        return stream

    async def complete(self, body: dict[str, Any]) -> tuple[Delta, dict[str, Any] | None]:
        """Run a generation to its end and return its tokens and vLLM's kv_transfer_params."""
        response = await self._post(body)
        try:
            reply = _decode_reply(await whole_body(response, self._tuning.reply_bytes))
            return reply.choices[0], reply.kv_transfer_params
        except (aiohttp.ClientError, OSError, IndexError, *_MALFORMED) as error:
            raise EngineLostError(f"the reply broke: {error!r}") from error
        finally:
            response.release()

    async def _post(self, body: dict[str, Any]) -> aiohttp.ClientResponse:
        try:
            response = await self._http.post(self._generate, data=_encode(body), headers=_JSON_HEADERS)
        except (aiohttp.ClientError, OSError) as error:
            raise EngineLostError(f"no connection: {error!r}") from error
        if response.status == 200:
            return response
        try:
            text = (await whole_body(response, self._tuning.reply_bytes)).decode(errors="replace")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise EngineLostError(f"the reply broke: {error!r}") from error
        finally:
            response.release()
        raise EngineRefusedError(response.status, _message(text))


def _message(text: str) -> str:
    """Read the message out of OpenAI's error form, or return the text."""
    try:
        error = msgspec.json.decode(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (KeyError, *_MALFORMED):
        return text[:500]
