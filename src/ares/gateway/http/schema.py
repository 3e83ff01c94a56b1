"""The OpenAPI document of replies, errors and headers. Not used in serving."""

from typing import Any, Literal

from pydantic import BaseModel

from ares.protocol.fields import CLASS_HEADER, REQUEST_ID_HEADER


class ErrorDetail(BaseModel):
    """What went wrong; `param` names the field, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's error form."""

    error: ErrorDetail


class Usage(BaseModel):
    """Tokens of a reply; a prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _Choice(BaseModel):
    index: int
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] = []
    """With `return_token_ids`."""


class Message(BaseModel):
    """The model's message."""

    role: str
    content: str


class ChatChoice(_Choice):
    """One answer."""

    message: Message


class TextChoice(_Choice):
    """One continuation."""

    text: str
    prompt_token_ids: list[int] = []
    """With `return_token_ids`."""


class _Completion(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage


class ChatCompletion(_Completion):
    """The reply of `POST /v1/chat/completions`, where it is not streamed."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_token_ids: list[int] = []
    """With `return_token_ids`."""
    prompt_text: str = ""
    """With `return_prompt_text`."""


class TextCompletion(_Completion):
    """The reply of `POST /v1/completions`, where it is not streamed."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ResponseReply(BaseModel):
    """The reply of `POST /v1/responses`, where it is not streamed; it has OpenAI's other fields too."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    output: list[dict[str, Any]]
    """Reasoning, messages, and calls of functions."""
    usage: dict[str, Any]


class AnthropicErrorDetail(BaseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(BaseModel):
    """Anthropic's error form."""

    type: Literal["error"]
    error: AnthropicErrorDetail


class MessageReply(BaseModel):
    """The reply of `POST /v1/messages`, where it is not streamed."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    """Blocks: thinking, text, and uses of tools."""
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: dict[str, int]


class TokenCount(BaseModel):
    """The reply of `POST /v1/messages/count_tokens`."""

    input_tokens: int
    context_management: dict[str, int]


_MEANINGS = {
    400: "The request cannot be served as it is; `error.param` names the field.",
    401: "No key, or a wrong one.",
    403: "The admin routes answer to loopback only, where they have no key.",
    404: "There is no such model, request or instance.",
    409: "The instance or the request is not in a state for it now.",
    413: "The body is too large.",
    429: "Too many sequences of this key run already, or would; `Retry-After` is when to try again.",
    502: "The instance failed the request.",
    503: "No instance can take it; `Retry-After` is when to try again.",
}
# The schema of one event, as OpenAPI before 3.2 has it.
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STREAM = {"text/event-stream": {"schema": _EVENT}}
_HEADERS = [
    (REQUEST_ID_HEADER, "Names the request, if it has 1 to 128 printable ASCII characters; the reply repeats it."),
    (CLASS_HEADER, "Class of service, one of the configured ones."),
]


def errors(*statuses: int, model: type[BaseModel] = ErrorReply) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of the errors that a route may answer with."""
    described: dict[int | str, dict[str, Any]] = {"default": {"model": model, "description": "Any other error."}}
    for status in statuses:
        described[status] = {"model": model, "description": _MEANINGS[status]}
    return described


def generation(
    reply: type[BaseModel], error: type[BaseModel] = ErrorReply, last_event: str = "`data: [DONE]`"
) -> dict[str, Any]:
    """Return the documentation of a generation route, as keywords of its registration."""
    described = {
        "model": reply,
        "description": f"The whole reply; with `stream`, events that end with {last_event}.",
        "content": _STREAM,
    }
    headers = [
        {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": "string"}}
        for name, text in _HEADERS
    ]
    return {
        "responses": {200: described, **errors(400, 401, 404, 413, 429, 502, 503, model=error)},
        "openapi_extra": {"parameters": headers},
    }
