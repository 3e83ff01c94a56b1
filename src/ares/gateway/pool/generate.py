"""The data channel to an instance: vLLM's token-level API (`POST /inference/v1/generate`, vLLM 0.32)."""

import asyncio
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import msgspec

from ares.gateway.pool.connection import BrokenReplyError
from ares.gateway.pool.connections import Connections, ReplyT
from ares.gateway.pool.delta import Delta, EngineLostError, EngineRefusedError
from ares.gateway.pool.merged_tokens import MergedTokens
from ares.gateway.pool.stream import MALFORMED, Stream
from ares.gateway.pool.whole_reply import WholeReply
from ares.gateway.tuning import DEFAULT, Tuning
from ares.protocol.fields import GENERATE_ROUTE, KV_TRANSFER_PARAMS, STEP_TOKENS
from ares.protocol.messages import StepTokens


class _Reply(msgspec.Struct):
    choices: list[Delta]
    kv_transfer_params: dict[str, Any] | None = None


_decode_reply = msgspec.json.Decoder(_Reply).decode
_encode = msgspec.json.Encoder().encode
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
        self._step_streams: dict[str, Stream] = {}
        # Those whose readers are to be woken.
        self._to_wake: dict[Stream, None] = {}

    @property
    def encrypted(self) -> bool:
        """Whether requests and replies are encrypted."""
        return self._tls is not None

    @property
    def step_streams(self) -> int:
        """How many streams the step channel brings tokens for."""
        return len(self._step_streams)

    async def stream(
        self, body: dict[str, Any], headers: Mapping[str, str] = _NO_HEADERS, *, step_tokens: bool = False
    ) -> Stream:
        """Start a streaming generation, sent with further headers; returns when the engine has accepted it.

        With `step_tokens` the instance is asked to send the tokens over its control channel after each step
        (`receive_step`), and with the reply only every `Tuning.chunk_tokens`. Log probabilities come with the reply
        alone.
        """
        chunk, key = self._tuning.chunk_tokens, None
        body = {**body, "stream": True}
        if step_tokens and chunk > 1 and body["sampling_params"].get("logprobs") is None:
            key = body["request_id"]
            body["sampling_params"] = {**body["sampling_params"], "stream_interval": chunk}
            body[KV_TRANSFER_PARAMS] = {**body[KV_TRANSFER_PARAMS], STEP_TOKENS: True}
        stream = await self._send(self._request(body, headers), lambda: self._make_stream(key))
        if (status := stream.ready.result()) != 200:
            try:
                raise EngineRefusedError(status, _message(await stream.text()))
            finally:
                stream.close()
        return stream

    def receive_step(self, event: StepTokens) -> None:
        """Give the tokens of a step to their streams.

        Their readers are woken when the messages that wait have been read: a gateway that falls behind writes the
        tokens of several steps at once, as it does with those of a reply.
        """
        if not self._to_wake:
            asyncio.get_running_loop().call_soon(self._wake_readers)
        for row in event.rows:
            if (stream := self._step_streams.get(row.key)) is not None:
                stream.receive_step_tokens(row.position, row.token_ids)
                self._to_wake[stream] = None

    def _wake_readers(self) -> None:
        waiting, self._to_wake = self._to_wake, {}
        for stream in waiting:
            stream.wake()

    def _make_stream(self, key: str | None) -> Stream:
        """Make the stream of a request; with its key, for tokens of the step channel."""
        if key is None:
            return Stream(self._tuning)
        stream = self._step_streams[key] = Stream(
            self._tuning, MergedTokens(), lambda: self._step_streams.pop(key, None)
        )
        return stream

    async def complete(
        self, body: dict[str, Any], headers: Mapping[str, str] = _NO_HEADERS
    ) -> tuple[Delta, dict[str, Any] | None]:
        """Run a generation to its end, sent with further headers; return its tokens and vLLM's kv_transfer_params."""
        whole = await self._send(self._request(body, headers), lambda: WholeReply(self._tuning.reply_bytes))
        data = whole.body
        if (status := whole.ready.result()) != 200:
            raise EngineRefusedError(status, _message(data.decode(errors="replace")))
        try:
            reply = _decode_reply(data)
            return reply.choices[0], reply.kv_transfer_params
        except (IndexError, *MALFORMED) as error:
            raise EngineLostError(f"the reply broke: {error!r}") from error

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._connections.close()

    async def _send(self, request: bytes, make: Callable[[], ReplyT]) -> ReplyT:
        """Send a request; return its reply when it is ready, EngineLostError where there is none."""
        try:
            return await self._connections.send(request, make)
        except OSError as error:  # a timeout is one too
            raise EngineLostError(f"no connection: {error!r}") from error
        except BrokenReplyError as error:
            raise EngineLostError(f"the reply broke: {error}") from error

    def _request(self, body: dict[str, Any], headers: Mapping[str, str]) -> bytes:
        data = _encode(body)
        further = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
        return b"%s%d\r\n%s\r\n%s" % (self._head, len(data), further, data)


def _message(text: str) -> str:
    """Read the message out of OpenAI's error form, or return the text."""
    try:
        error = msgspec.json.decode(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (KeyError, *MALFORMED):
        return text[:500]
