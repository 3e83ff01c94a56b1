"""Requests of `/v1/responses` (vLLM 0.32, openai/responses/protocol.py; the official client's `responses.create`)."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from ares.gateway.openai.body import BadRequestError, Body, Listed, refuse_not_offered
from ares.gateway.openai.requests import ChatRequest
from ares.gateway.openai.responses.items import chat_messages, continues_final_message

NOTHING_KEPT = "no response is kept here: send the whole conversation as input, with the output items of earlier turns"
_LOGPROBS = "message.output_text.logprobs"
# Fields that a chat request has too, under the same names: it takes them, or refuses them by name (`unsupported`).
_OF_CHAT = (
    *("allowed_token_ids", "bad_words", "cache_salt", "chat_template", "chat_template_kwargs", "ec_transfer_params"),
    *("frequency_penalty", "ignore_eos", "include_reasoning", "include_stop_str_in_output", "kv_transfer_params"),
    *("logit_bias", "media_io_kwargs", "min_p", "min_tokens", "mm_processor_kwargs", "model", "parallel_tool_calls"),
    *("presence_penalty", "priority", "repetition_detection", "repetition_penalty", "request_id", "seed"),
    *("session_id", "skip_special_tokens", "stop", "stop_token_ids", "stream", "structured_outputs", "temperature"),
    *("thinking_token_budget", "top_k", "top_p", "truncate_prompt_tokens", "vllm_xargs", "watermarking"),
)
# Fields that are not offered, with the values that ask for nothing, and what to do instead.
_NOT_OFFERED: dict[str, tuple[tuple[Any, ...], str]] = {
    "access_programs": (({},), "leave it out"),
    "background": ((False,), "the request runs while its client waits; stream it, or leave it out"),
    "background_options": (({},), "leave it out"),
    "context_management": (([],), "shorten the input"),
    "conversation": ((), NOTHING_KEPT),
    "enable_response_messages": ((False,), "/tokenize gives the tokens of a prompt"),
    "image": (({},), "the model writes text only"),
    "moderation": ((), "leave it out"),
    "previous_input_messages": (([],), "send the whole conversation as input"),
    "previous_response_id": ((), NOTHING_KEPT),
    "prompt": ((), "prompts are not kept here; send instructions and input"),
    "prompt_cache_options": (({}, {"mode": "implicit"}), "prefixes are cached as the instances have room"),
    "prompt_cache_retention": (("in_memory",), "prefixes are cached as the instances have room"),
    "service_tier": (("auto", "default"), "there is one tier; the header x-ares-class names a class of service"),
    "stream_options": (({}, {"include_obfuscation": False}), "events are sent as they are"),
    "truncation": (("disabled",), "shorten the input"),
}
_OF_REASONING: dict[str, tuple[Any, ...]] = {
    "context": ("auto",),
    "generate_summary": ("auto",),
    "mode": ("standard",),
    "summary": ("auto",),
}


class Reasoning(Body):
    """How the model reasons. Its reasoning comes whole, without a summary."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class TextFormat(Body):
    """The form of the text: any, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class TextConfig(Body):
    """What text the model writes."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(Body):
    """`POST /v1/responses`.

    Fields that would have no effect are refused by name. Those that change no output (`user`, `safety_identifier`,
    `prompt_cache_key`, `max_tool_calls`: no tool runs here) are repeated in the response. Unknown ones are ignored.
    """

    model: str | None = None
    input: str | Listed[Any]
    """Text, or items: messages, reasoning, calls of functions and their outputs."""
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    max_tool_calls: int | None = None
    metadata: dict[str, str] | None = None
    include: (
        Listed[
            Literal[
                "code_interpreter_call.outputs",
                "computer_call_output.output.image_url",
                "file_search_call.results",
                "message.input_image.image_url",
                "message.output_text.logprobs",
                "reasoning.encrypted_content",
                "web_search_call.action.sources",
                "web_search_call.results",
            ]
        ]
        | None
    ) = None
    """Of these, only log probabilities are there to be included; reasoning comes in clear."""
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    parallel_tool_calls: bool = True
    reasoning: Reasoning | None = None
    stream: bool = False
    store: bool = True
    """Without effect: no response is kept, and the reply has `store: false`."""
    text: TextConfig | None = None
    tool_choice: Any = "auto"
    tools: Listed[dict[str, Any]] = Field(default_factory=list)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Listed[str] | None = None
    stop_token_ids: Listed[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    logit_bias: dict[str, float] | None = None
    structured_outputs: dict[str, Any] | None = None
    include_reasoning: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: int = 0
    request_id: str | None = None
    vllm_xargs: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def chat_body(self) -> dict[str, Any]:
        """Return the body of the chat request that generates the same.

        Raises
        ------
        BadRequestError
            A field, an item or a tool is not offered.
        """
        self.check_text()
        given = {name: value for name, value in self if name in self.model_fields_set}
        self._refuse(given)
        body = {name: given[name] for name in _OF_CHAT if name in given}
        body["messages"] = chat_messages(self.instructions, self.input)
        if continues_final_message(self.input):
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if self.max_output_tokens is not None:
            body["max_completion_tokens"] = self.max_output_tokens
        if _LOGPROBS in (self.include or []):
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.reasoning is not None and self.reasoning.effort is not None:
            body["reasoning_effort"] = self.reasoning.effort
        return body | self._response_format() | self._tools()

    def chat_request(self) -> "ResponsesChat":
        """Return that request; see `chat_body`."""
        return ResponsesChat.of(self.chat_body())

    def _refuse(self, given: dict[str, Any]) -> None:
        refuse_not_offered(given, _NOT_OFFERED)
        for name, value in ((self.reasoning and self.reasoning.model_extra) or {}).items():
            if name in _OF_REASONING and value not in _OF_REASONING[name]:
                instead = "the reasoning itself comes, without a summary" if "summary" in name else "leave it out"
                raise BadRequestError(f"reasoning.{name} is not offered here: {instead}", f"reasoning.{name}")
        if self.top_logprobs and _LOGPROBS not in (self.include or []):
            raise BadRequestError(f"top_logprobs needs include with {_LOGPROBS}", "top_logprobs")

    def _response_format(self) -> dict[str, Any]:
        wanted = self.text.format if self.text is not None else None
        if wanted is None or wanted.type == "text":
            return {}
        if self.structured_outputs is not None:
            raise BadRequestError("give text.format or structured_outputs, not both", "text.format")
        if wanted.type == "json_object":
            return {"response_format": {"type": "json_object"}}
        if wanted.schema_ is None:
            raise BadRequestError("text.format.schema: should be an object", "text.format.schema")
        schema = {"name": wanted.name or "schema", "schema": wanted.schema_}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}

    def _tools(self) -> dict[str, Any]:
        for number, tool in enumerate(self.tools):
            if tool.get("type") != "function":
                path = f"tools.{number}"
                raise BadRequestError(f"{path}: a tool of type {tool.get('type')} is not offered: give functions", path)
            if not isinstance(tool.get("name"), str):
                raise BadRequestError(f"tools.{number}.name: should be text", f"tools.{number}.name")
        choice = self.tool_choice
        named = isinstance(choice, dict) and choice.get("type") == "function"
        if choice not in ("none", "auto", "required") and not named:
            message = "tool_choice: should be none, auto, required, or an object with type function and a name"
            raise BadRequestError(message, "tool_choice")
        if not self.tools:
            if choice not in ("none", "auto"):
                raise BadRequestError("tool_choice needs tools", "tool_choice")
            return {}
        if named and choice.get("name") not in [tool["name"] for tool in self.tools]:
            raise BadRequestError("tool_choice: there is no such function in tools", "tool_choice")
        tools = [{"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in self.tools]
        return {
            "tools": tools,
            "tool_choice": {"type": "function", "function": {"name": choice["name"]}} if named else choice,
        }


class ResponsesChat(ChatRequest):
    """The chat request that generates a response; its errors name the fields of the response's request."""

    prompt_field: ClassVar[str] = "input"
    limit_field: ClassVar[str] = "max_output_tokens"
