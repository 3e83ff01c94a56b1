"""The data channel to an instance: vLLM's token-level API (`POST /inference/v1/generate`, vLLM 0.32)."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec

# A prefill of a long prompt behind others may take long; a decode stream may be silent while it waits for KV.
_CONNECT_TIMEOUT_S = 5.0


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


class _Chunk(msgspec.Struct):
    choices: list[Delta] = []
    error: dict[str, Any] | None = None


class _Reply(msgspec.Struct):
    choices: list[Delta]
    kv_transfer_params: dict[str, Any] | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_reply = msgspec.json.Decoder(_Reply).decode
_encode = msgspec.json.Encoder().encode
_JSON = {"Content-Type": "application/json"}


def session() -> aiohttp.ClientSession:
    """Make the HTTP client that all streams of a gateway share."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
        auto_decompress=False,
        read_bufsize=1 << 18,
    )


class Stream:
    """An open generation on an instance. Close it to abort the generation."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def batches(self) -> AsyncIterator[list[Delta]]:
        """Yield what each read brought, parsed once.

        Raises
        ------
        EngineLostError
            The connection broke before the stream ended.
        EngineRefusedError
            The engine failed the request.
        """
        left = b""
        try:
            async for data in self._response.content.iter_any():
                *events, left = (left + data).split(b"\n\n")
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
        except (aiohttp.ClientError, OSError, msgspec.DecodeError) as error:
            raise EngineLostError(f"the stream broke: {error!r}") from error

    def close(self) -> None:
        """Close the connection: the engine aborts what still runs."""
        self._response.close()


class EngineClient:
    """Token-level requests to one instance."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._generate = f"{url}/inference/v1/generate"

    async def stream(self, body: dict[str, Any]) -> Stream:
        """Start a streaming generation; returns when the engine has accepted it."""
        response = await self._post({**body, "stream": True})
        return Stream(response)

    async def complete(self, body: dict[str, Any]) -> tuple[Delta, dict[str, Any] | None]:
        """Run a generation to its end and return its tokens and vLLM's kv_transfer_params."""
        response = await self._post(body)
        try:
            reply = _decode_reply(await response.read())
        except (aiohttp.ClientError, OSError, msgspec.DecodeError) as error:
            raise EngineLostError(f"the reply broke: {error!r}") from error
        finally:
            response.release()
        return reply.choices[0], reply.kv_transfer_params

    async def _post(self, body: dict[str, Any]) -> aiohttp.ClientResponse:
        try:
            response = await self._http.post(self._generate, data=_encode(body), headers=_JSON)
        except (aiohttp.ClientError, OSError) as error:
            raise EngineLostError(f"no connection: {error!r}") from error
        if response.status == 200:
            return response
        text = await response.text()
        response.release()
        raise EngineRefusedError(response.status, _message(text))


def _message(text: str) -> str:
    """Read the message out of OpenAI's error form, or return the text."""
    try:
        error = msgspec.json.decode(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (msgspec.DecodeError, KeyError, TypeError):
        return text[:500]
