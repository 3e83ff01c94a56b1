"""Requests of `/v1/messages` (vLLM 0.32, entrypoints/anthropic; the official client's `messages.create`)."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from ares.gateway.anthropic.conversion import chat_messages
from ares.gateway.openai.body import BadRequestError, Body, Listed, refuse_not_offered
from ares.gateway.openai.requests import ChatRequest

# Fields that a chat request has too; it takes them, or refuses them by name (`unsupported`).
_OF_CHAT = (
    *("cache_salt", "chat_template_kwargs", "ec_transfer_params", "kv_transfer_params"),
    *("temperature", "top_k", "top_p", "vllm_xargs", "watermarking"),
)
# Fields that are not offered, with the values that ask for nothing, and what to do instead.
_NOT_OFFERED: dict[str, tuple[tuple[Any, ...], str]] = {
    "billing_policy": ((), "leave it out"),
    "compaction": ((), "shorten the messages"),
    "container": ((), "leave it out"),
    "context_management": (({}, {"edits": []}), "shorten the messages"),
    "diagnostics": ((), "leave it out"),
    "fallback_credit_token": ((), "leave it out"),
    "fallbacks": (([],), "leave it out"),
    "inference_geo": ((), "leave it out"),
    "mcp_servers": (([],), "give tools with an input_schema"),
    "service_tier": (("auto", "standard_only"), "there is one tier; the header x-ares-class names a class of service"),
    "speed": (("standard",), "leave it out"),
    "thread": ((), "send all messages"),
    "user_profile_id": ((), "leave it out"),
    "workspace_id": ((), "leave it out"),
}


class ToolDefinition(Body):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    defer_loading: bool | None = None

    def chat_tool(self) -> dict[str, Any]:
        """Return it as the tool of a chat."""
        schema = self.input_schema
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": schema if "type" in schema else {**schema, "type": "object"},
            "strict": self.strict,
            "defer_loading": self.defer_loading,
        }
        return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


class ToolChoice(Body):
    """Which tool the model calls, if any."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class JsonFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"] = "json_schema"
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How the model answers."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class Thinking(Body):
    """Whether the model reasons first, and for how many tokens."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1024)
    display: Literal["summarized"] | None = None


class CountTokensRequest(Body):
    """`POST /v1/messages/count_tokens`."""

    model: str | None = None
    messages: Listed[Any] = Field(min_length=1)
    system: str | Listed[Any] | None = None
    tools: Listed[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def chat_body(self, *, system_first: bool, disabled_thinking: str) -> dict[str, Any]:
        """Return the body of the chat request that generates the same.

        Parameters
        ----------
        system_first
            The template takes a system message as the first one only: all others are joined to it.
        disabled_thinking
            The reasoning effort by which the template lets the model not reason.

        Raises
        ------
        BadRequestError
            A field, a content block or a tool is not offered.
        """
        self.check_text()
        given = {name: value for name, value in self if name in self.model_fields_set}
        refuse_not_offered(given, _NOT_OFFERED)
        body = {name: given[name] for name in ("model", *_OF_CHAT) if name in given}
        body["messages"] = chat_messages(self.system, self.messages, system_first=system_first)
        return body | self._output() | self._thinking(disabled_thinking) | self._tools()

    def _output(self) -> dict[str, Any]:
        config, body = self.output_config, dict[str, Any]()
        if config is not None and config.effort is not None:
            body["reasoning_effort"] = config.effort
        if config is not None and config.format is not None:
            schema = {"name": config.format.type, "schema": config.format.schema_}
            body["response_format"] = {"type": config.format.type, "json_schema": schema}
        return body

    def _thinking(self, disabled: str) -> dict[str, Any]:
        thinking = self.thinking
        if thinking is None or thinking.type == "adaptive":
            return {}
        if thinking.type == "disabled":
            return {"reasoning_effort": disabled}
        if thinking.budget_tokens is None:
            raise BadRequestError("thinking.budget_tokens: is needed with type enabled", "thinking.budget_tokens")
        return {"thinking_token_budget": thinking.budget_tokens}

    def _tools(self) -> dict[str, Any]:
        choice, tools = self.tool_choice, self.tools or []
        if choice is not None and choice.type in ("any", "tool") and not tools:
            raise BadRequestError("tool_choice needs tools", "tool_choice")
        if not tools:
            return {}
        body: dict[str, Any] = {"tools": [tool.chat_tool() for tool in tools], "tool_choice": "auto"}
        if choice is None:
            return body
        if choice.disable_parallel_tool_use:
            body["parallel_tool_calls"] = False
        if choice.type == "tool":
            if choice.name not in [tool.name for tool in tools]:
                raise BadRequestError("tool_choice.name: there is no such tool in tools", "tool_choice.name")
            body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        else:
            body["tool_choice"] = {"any": "required"}.get(choice.type, choice.type)
        return body


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`.

    Fields that would have no effect are refused by name; `metadata` and `cache_control` change no output, and unknown
    fields are ignored.
    """

    max_tokens: int = Field(ge=1)
    stop_sequences: Listed[str] | None = None
    stream: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    metadata: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None

    def chat_body(self, *, system_first: bool, disabled_thinking: str) -> dict[str, Any]:
        """Return the body of the chat request that generates the same."""
        budget = self.thinking.budget_tokens if self.thinking is not None else None
        if budget is not None and budget >= self.max_tokens:
            raise BadRequestError("thinking.budget_tokens must be less than max_tokens", "thinking.budget_tokens")
        body = super().chat_body(system_first=system_first, disabled_thinking=disabled_thinking)
        body |= {"max_completion_tokens": self.max_tokens, "stream": self.stream}
        if self.stop_sequences:
            body["stop"] = self.stop_sequences
        return body


class MessagesChat(ChatRequest):
    """The chat request that generates a message; its errors name the fields of `/v1/messages`."""

    limit_field: ClassVar[str] = "max_tokens"
