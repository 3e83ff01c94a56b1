"""vLLM's token-level API (`POST /inference/v1/generate`, vLLM 0.32): what is accepted and how it is answered."""

import time
import uuid
from typing import Annotated, Any

import msgspec

from ares.mock_engine.http import MALFORMED, Connection, HttpError, chunk, server_sent_event
from ares.mock_engine.model import MockModel, fold
from ares.mock_engine.request import Request
from ares.protocol import fields

# Ends a stream.
DONE = chunk(b"data: [DONE]\n\n")
_LOGPROB = -1.0

_Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]


class _Sampling(msgspec.Struct):
    """The sampling parameters with an effect here; the others are accepted and change nothing."""

    max_tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 53)] | None = None
    min_tokens: _Count = 0
    ignore_eos: bool = False
    stop_token_ids: list[_Token] | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    stream_interval: Annotated[int, msgspec.Meta(ge=1)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1)] = 1
    extra_args: dict[str, Any] | None = None


class _Generate(msgspec.Struct):
    token_ids: Annotated[list[_Token], msgspec.Meta(min_length=1)]
    sampling_params: _Sampling
    request_id: str | None = None
    model: str | None = None
    stream: bool | None = False
    priority: int = 0
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None


_decode = msgspec.json.Decoder(_Generate).decode
_encode = msgspec.json.encode


def read(body: bytes, model: MockModel, maximum: int, connection: Connection) -> Request:
    """Make a request of a body.

    Parameters
    ----------
    maximum
        Tokens of the longest sequence.

    Raises
    ------
    HttpError
        vLLM would refuse the body; the message says why.
    """
    try:
        asked = _decode(body)
    except MALFORMED as error:
        raise HttpError(400, f"1 validation error: {error}") from error
    sampling, params, tokens = asked.sampling_params, asked.kv_transfer_params or {}, asked.token_ids
    if max(tokens) >= model.vocabulary:
        raise HttpError(400, f"Token id {max(tokens)} is out of vocabulary", "token_ids")
    if not -(2**63) <= asked.priority < 2**63:
        raise HttpError(400, "priority must fit in 64 bits", "priority")
    if sampling.n != 1:
        raise HttpError(400, "the mock engine generates one output a request: n must be 1", "n")
    room = maximum - len(tokens)
    if room < 1:
        message = f"This model's maximum context length is {maximum} tokens. However, your request has {len(tokens)}"
        raise HttpError(400, f"{message} input tokens. Please reduce the length of the input messages.", "token_ids")
    limit = min(sampling.max_tokens or room, room)
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise HttpError(400, f"min_tokens must be less than or equal to max_tokens={sampling.max_tokens}", "min_tokens")
    key, generated, source = _transfer(params, len(tokens))
    prompt_hash = fold(tokens[: len(tokens) - generated])
    ended = fold(tokens[len(tokens) - generated :], prompt_hash)
    script = _script(sampling.extra_args or {}, model)
    whole = (sampling.extra_args or {}).get(fields.MOCK_OUTPUT_TOKENS, len(script) + 1 if script else None)
    if whole is None:
        whole = model.output_tokens(prompt_hash)
    elif not isinstance(whole, int) or isinstance(whole, bool) or whole < 1:
        raise HttpError(400, f"{fields.MOCK_OUTPUT_TOKENS} must be a positive integer, got {whole!r}", "extra_args")
    natural = limit + 1 if sampling.ignore_eos else max(1, sampling.min_tokens, whole - generated)
    return Request(
        id=asked.request_id or uuid.uuid4().hex,
        key=key,
        prompt=tokens,
        generated=generated,
        hash=ended,
        prompt_hash=prompt_hash,
        end=limit,
        natural_end=natural,
        connection=connection,
        stream=bool(asked.stream),
        priority=asked.priority,
        stop_tokens=frozenset(sampling.stop_token_ids or ()),
        logprobs=sampling.logprobs,
        interval=sampling.stream_interval or 1,
        sends_tokens=key is not None and params.get(fields.STEP_TOKENS) is True,
        remote_decode=params.get(fields.DO_REMOTE_DECODE) is True,
        source=source,
        script=script,
        salt=asked.cache_salt or "",
    )


def _script(extra: dict[str, Any], model: MockModel) -> list[int]:
    """Return the token ids that a client wants as its output; empty where it leaves them to the model."""
    tokens = extra.get(fields.MOCK_TOKENS, [])
    if not isinstance(tokens, list) or not all(type(n) is int and 0 <= n < model.vocabulary for n in tokens):
        raise HttpError(400, f"{fields.MOCK_TOKENS} must be a list of token ids", "extra_args")
    return tokens


def _transfer(params: dict[str, Any], tokens: int) -> tuple[str | None, int, dict[str, Any] | None]:
    """Return the gateway's key, the output tokens that the prompt ends with, and the KV to pull, if any."""
    key, generated = params.get(fields.KEY), params.get(fields.GENERATED_TOKENS, 0)
    if key is not None and not isinstance(key, str):
        raise HttpError(400, f"{fields.KEY} must be a string", fields.KV_TRANSFER_PARAMS)
    if not isinstance(generated, int) or not 0 <= generated < tokens:
        raise HttpError(
            400, f"{fields.GENERATED_TOKENS} must be a number below that of the tokens", fields.KV_TRANSFER_PARAMS
        )
    if params.get(fields.DO_REMOTE_PREFILL) is not True:
        return key, generated, None
    kinds = {
        fields.REMOTE_ENGINE_ID: str,
        fields.REMOTE_REQUEST_ID: str,
        fields.REMOTE_HOST: str,
        fields.REMOTE_PORT: int,
    }
    for name, kind in kinds.items():
        if not isinstance(params.get(name), kind):
            raise HttpError(400, f"{fields.DO_REMOTE_PREFILL} needs {name}", fields.KV_TRANSFER_PARAMS)
    return key, generated, {name: params[name] for name in kinds}


# --- replies ---


def prepare(request: Request) -> None:
    """Format what every event of a stream begins with, HTTP chunk included: one form for each length of a token id."""
    head = _event_head(request)
    for digits in range(7):
        size = len(head) + digits + len(_EVENT_END)
        request.heads += (b"%x\r\n" % size + head,)


def _event_head(request: Request) -> bytes:
    return b'data: {"request_id":' + _encode(request.id) + b',"usage":null,"output_mode":"tokens","choices":[' + _CHOICE


_CHOICE = (
    b'{"index":0,"finish_reason":null,"stop_reason":null,"routed_experts":null,"sampling_mask":null,'
    b'"weight_versions":null,"logprobs":null,"token_ids":['
)
_EVENT_END = b"]}]}\n\n"
# What follows the digits of a token, to the end of the chunk.
EVENT_TAIL = _EVENT_END + b"\r\n"


def event(request: Request, tokens: list[int], finish: str | None = None, stop: int | str | None = None) -> bytes:
    """Return an event of a stream in its own HTTP chunk."""
    choice = _choice(request, tokens, finish, stop)
    body = {"request_id": request.id, "usage": None, "output_mode": "tokens", "choices": [choice]}
    return server_sent_event(body)


def last_event(request: Request, tokens: list[int], finish: str, stop: int | str | None) -> bytes:
    """Return the event that ends a stream, and `[DONE]`."""
    return event(request, tokens, finish, stop) + DONE


def whole(
    request: Request, model: str, finish: str, stop: int | str | None, transfer: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the reply to a request that is not streamed."""
    prompt, output = len(request.prompt), len(request.output)
    return {
        "request_id": request.id,
        "model": model,
        "created": int(time.time()),
        "usage": {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output},
        fields.KV_TRANSFER_PARAMS: transfer,
        "output_mode": "tokens",
        "choices": [_choice(request, request.output, finish, stop)],
    }


def _choice(request: Request, tokens: list[int], finish: str | None, stop: int | str | None) -> dict[str, Any]:
    return {
        "index": 0,
        "finish_reason": finish,
        "stop_reason": stop,
        "routed_experts": None,
        "sampling_mask": None,
        "weight_versions": None,
        "logprobs": _logprobs(request, tokens),
        "token_ids": tokens,
    }


def _logprobs(request: Request, tokens: list[int]) -> dict[str, Any] | None:
    """Return made-up log probabilities: the form is vLLM's, the numbers mean nothing."""
    if request.logprobs is None:
        return None
    content = []
    for token in tokens:
        listed = {"token": f"token_id:{token}", "token_id": token, "logprob": _LOGPROB, "bytes": None}
        others = [
            {**listed, "token": f"token_id:{n}", "token_id": n, "logprob": _LOGPROB - 1 - n}
            for n in range(request.logprobs)
        ]
        content.append({**listed, "top_logprobs": [listed, *others][: max(1, request.logprobs)]})
    return {"content": content}
