"""The data channel to an instance: vLLM's token-level API (`POST /inference/v1/generate`, vLLM 0.32)."""

import asyncio
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple, cast

import aiohttp
import httptools
import msgspec

from ares.gateway.pool.connections import BrokenReplyError, Connections
from ares.gateway.pool.merged_tokens import DifferentTokensError, MergedTokens
from ares.gateway.tuning import DEFAULT, Tuning
from ares.protocol.fields import GENERATE_ROUTE, KV_TRANSFER_PARAMS, REPETITION, REPETITION_DETECTED, STEP_TOKENS
from ares.protocol.messages import StepTokens


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
_TOKEN_IDS = b'"token_ids":['
# Longer ids are no model's.
_ID_DIGITS = 9
_NO_HEADERS: Mapping[str, str] = {}


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


class _Form(NamedTuple):
    """What the events of a stream with one token and nothing else have in common: all but the digits of the token."""

    before: bytes
    after: bytes

    @classmethod
    def of(cls, event: bytes, parsed: Delta) -> "_Form | None":
        """Return the form of an event that was parsed; None where it has more than one token, or other than that."""
        if parsed.finish_reason is not None or parsed.stop_reason is not None or parsed.logprobs is not None:
            return None
        ids = parsed.token_ids
        if not ids or len(ids) != 1 or event.count(_TOKEN_IDS) != 1:
            return None
        before, name, value = event.partition(_TOKEN_IDS)
        digits, end, after = value.partition(b"]")
        return cls(before + name, end + after) if digits == b"%d" % ids[0] else None

    def token(self, event: bytes) -> int | None:
        """Return the token of an event of this form; None for any other, which has to be parsed."""
        if not (event.startswith(self.before) and event.endswith(self.after)):
            return None
        digits = event[len(self.before) : -len(self.after)]
        # JSON has no leading zeros.
        return int(digits) if digits.isdigit() and len(digits) <= _ID_DIGITS and digits[:1] != b"0" else None


# That of no event.
_NO_FORM = _Form(b"\0", b"\0")


class Stream(asyncio.Protocol):
    """An open generation on an instance, on a connection of its own. Close it to abort the generation.

    In serving, a read brings one token, and the overhead of a general HTTP client for each read would exceed all other
    work for the token: httptools parses HTTP, and its callbacks are the public methods below.

    Parameters
    ----------
    merged
        Merges the tokens of a step channel with those of the reply; None: there is no step channel.
    on_end
        Called when the connection has ended.
    """

    def __init__(
        self,
        tuning: Tuning = DEFAULT,
        merged: MergedTokens | None = None,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        self._tuning = tuning
        self._merged = merged
        self._on_end = on_end
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._received: list[bytes] = []
        self._unread = 0
        # Begin of an event whose end has not come.
        self._left = b""
        self._form = _NO_FORM
        # Set to what `take` has left while a reader waits.
        self._arrival: asyncio.Future[list[Delta]] | None = None
        self._take: Callable[[list[Delta]], bool] | None = None
        self._complete = False
        self._lost: Exception | None = None

    @property
    def starved(self) -> bool:
        """Whether its reader waits for data."""
        return self._arrival is not None and not self._arrival.done()

    async def batches(self) -> AsyncIterator[list[Delta]]:
        """Yield the new tokens of each read; the errors are those of `batch`."""
        while batch := await self.batch():
            yield batch

    async def batch(self, take: Callable[[list[Delta]], bool] | None = None) -> list[Delta]:
        """Return the next new tokens, those of one read; empty at the end.

        Parameters
        ----------
        take
            Given the tokens of a read as they arrive while this waits; where it returns True they are done with, and
            nothing is woken. What it raises is raised here.

        Raises
        ------
        EngineLostError
            The connection broke before the stream ended.
        EngineRefusedError
            The engine failed the request.
        """
        while True:
            if self._received or (self._merged is not None and self._merged.waiting):
                batch = self._come()
            elif self._complete:
                return []
            else:
                self._take = take
                try:
                    batch = await self._more()
                finally:
                    self._take = None
            if batch:
                return batch

    def early(self, position: int, token_ids: list[int]) -> None:
        """Take tokens of the step channel: the instance had generated `position` tokens before them."""
        if self._merged is not None:
            self._merged.early(position, token_ids)
            self._wake()

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
            await self._more()
        return self._drain()

    async def _more(self) -> list[Delta]:
        """Wait until something has arrived; return what `take` has left of it."""
        if self._lost is not None:
            raise EngineLostError(f"the stream broke: {self._lost!r}") from self._lost
        self._arrival = asyncio.get_running_loop().create_future()
        return await self._arrival

    def _drain(self) -> bytes:
        """Return the data that has arrived."""
        data = self._received[0] if len(self._received) == 1 else b"".join(self._received)
        self._received.clear()
        if self._unread > self._tuning.unread_bytes:
            self._transport.resume_reading()
        self._unread = 0
        return data

    def _come(self) -> list[Delta]:
        """Return the new tokens of what has come, over the step channel and in complete events; errors as `_parse`."""
        batch = self._parse(self._drain()) if self._received else []
        if (merged := self._merged) is None:
            return batch
        try:
            for delta in batch:
                merged.streamed(delta.token_ids or [])
        except DifferentTokensError as error:
            raise EngineRefusedError(500, str(error)) from error
        deltas = [Delta(token_ids=token_ids) for token_ids in merged.take()]
        if batch and (last := batch[-1]).finish_reason is not None:
            end = deltas[-1] if deltas else Delta(token_ids=[])
            end.finish_reason, end.stop_reason = last.finish_reason, last.stop_reason
            return deltas or [end]
        return deltas

    def _parse(self, data: bytes) -> list[Delta]:
        """Return the new tokens of the events that are complete; EngineLostError, EngineRefusedError."""
        if self._left:
            data = self._left + data
        token = self._form.token(data)
        if token is not None:
            self._left = b""
            return [Delta(token_ids=[token])]
        *events, self._left = data.split(b"\n\n")
        batch: list[Delta] = []
        try:
            if len(self._left) > self._tuning.event_bytes:
                raise ValueError(f"an event is larger than {self._tuning.event_bytes} bytes")
            for event in events:
                if event == b"data: [DONE]":
                    continue
                chunk = _decode_chunk(event[6:])
                if chunk.error is not None:
                    raise EngineRefusedError(
                        int(chunk.error.get("code") or 500), str(chunk.error.get("message", "the engine failed"))
                    )
                batch += chunk.choices
        except _MALFORMED as error:
            raise EngineLostError(f"the stream broke: {error!r}") from error
        if len(batch) == 1 and len(events) == 1 and not self._left:
            self._form = _Form.of(data, batch[0]) or self._form
        return batch

    def _wake(self) -> None:
        """Give what has arrived to `take`, and wake the reader where there is more to do."""
        arrival = self._arrival
        if arrival is None or arrival.done():
            return
        left: list[Delta] = []
        try:
            if self._take is not None:
                left = self._come()
                if not left or self._take(left):
                    if self._lost is None and not self._complete:
                        return
                    left = []
        except Exception as error:  # of `take`, which is its reader's
            arrival.set_exception(error)
        else:
            arrival.set_result(left)

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
        self._on_end()
        del self._parser  # it refers to this object: with it, both would wait for garbage collection

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
        self._tuning = tuning
        parts = urllib.parse.urlsplit(url + GENERATE_ROUTE)
        self._tls = parts.scheme == "https" or None
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._tls else 80)
        head = {"Host": parts.netloc, "Content-Type": "application/json", **http.headers, "Content-Length": ""}
        lines = [f"POST {parts.path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
        self._head = "\r\n".join(lines).encode()
        self._connections = Connections(self._host, self._port, self._tls, tuning)
        # Those that the step channel brings tokens for, by the key of their request.
        self._early: dict[str, Stream] = {}

    @property
    def encrypted(self) -> bool:
        """Whether requests and replies are encrypted."""
        return self._tls is not None

    async def stream(
        self, body: dict[str, Any], headers: Mapping[str, str] = _NO_HEADERS, *, step_tokens: bool = False
    ) -> Stream:
        """Start a streaming generation, sent with further headers; returns when the engine has accepted it.

        With `step_tokens` the instance is asked to send the tokens over its control channel after each step (`early`),
        and with the reply only every `Tuning.chunk_tokens`. Log probabilities come with the reply alone.
        """
        chunk, key = self._tuning.chunk_tokens, None
        body = {**body, "stream": True}
        if step_tokens and chunk > 1 and body["sampling_params"].get("logprobs") is None:
            key = body["request_id"]
            body["sampling_params"] = {**body["sampling_params"], "stream_interval": chunk}
            body[KV_TRANSFER_PARAMS] = {**body[KV_TRANSFER_PARAMS], STEP_TOKENS: True}
        request = self._request(body, headers)
        stream = self._make_stream(key)
        try:
            async with asyncio.timeout(self._tuning.connect_s):
                await asyncio.get_running_loop().create_connection(
                    lambda: stream, self._host, self._port, ssl=self._tls
                )
        except BaseException as error:
            self._early.pop(key or "", None)
            if isinstance(error, OSError):  # a timeout is one too
                raise EngineLostError(f"no connection: {error!r}") from error
            raise
        try:
            stream.send(request)
            status = await stream.status
            if status != 200:
                raise EngineRefusedError(status, _message(await stream.text()))
        except BaseException:
            stream.close()
            raise
        return stream

    def early(self, event: StepTokens) -> None:
        """Give the tokens of a step to their streams."""
        for row in event.rows:
            if (stream := self._early.get(row.key)) is not None:
                stream.early(row.position, row.token_ids)

    def _make_stream(self, key: str | None) -> Stream:
        """Make the stream of a request; with its key, for tokens of the step channel."""
        if key is None:
            return Stream(self._tuning)
        stream = self._early[key] = Stream(self._tuning, MergedTokens(), lambda: self._early.pop(key, None))
        return stream

    async def complete(
        self, body: dict[str, Any], headers: Mapping[str, str] = _NO_HEADERS
    ) -> tuple[Delta, dict[str, Any] | None]:
        """Run a generation to its end, sent with further headers; return its tokens and vLLM's kv_transfer_params."""
        try:
            status, data = await self._connections.ask(self._request(body, headers))
        except OSError as error:  # a timeout is one too
            raise EngineLostError(f"no connection: {error!r}") from error
        except BrokenReplyError as error:
            raise EngineLostError(f"the reply broke: {error}") from error
        if status != 200:
            raise EngineRefusedError(status, _message(data.decode(errors="replace")))
        try:
            reply = _decode_reply(data)
            return reply.choices[0], reply.kv_transfer_params
        except (IndexError, *_MALFORMED) as error:
            raise EngineLostError(f"the reply broke: {error!r}") from error

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._connections.close()

    def _request(self, body: dict[str, Any], headers: Mapping[str, str]) -> bytes:
        data = _encode(body)
        further = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
        return b"%s%d\r\n%s\r\n%s" % (self._head, len(data), further, data)


def _message(text: str) -> str:
    """Read the message out of OpenAI's error form, or return the text."""
    try:
        error = msgspec.json.decode(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (KeyError, *_MALFORMED):
        return text[:500]
