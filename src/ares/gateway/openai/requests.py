"""OpenAI's requests: which are accepted, and their sampling for the engine."""

from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import Field, ModelWrapValidatorHandler, StrictBool, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ares.gateway.openai import unsupported
from ares.gateway.openai.body import BadRequestError, Body, Listed
from ares.gateway.openai.messages import Message, Tool
from ares.gateway.openai.sampling import Sampling
from ares.protocol.fields import CARRIES_OUTPUT, CARRIES_SEED, CARRIES_STRUCTURED_OUTPUTS

# Sampling parameters for which vLLM keeps no state, or only state that prompt + output restore: a move carries them
# exactly.
_CARRIED_BY_TOKENS = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
}
# Parameters with state, and what an instance must restore (`messages.Hello.carries`) for it to survive a move. Where
# one of the instances does not, such requests are not moved.
_STATEFUL = {
    "seed": CARRIES_SEED,
    "frequency_penalty": CARRIES_OUTPUT,
    "presence_penalty": CARRIES_OUTPUT,
    "bad_words": CARRIES_OUTPUT,
    "repetition_detection": CARRIES_OUTPUT,
    "structured_outputs": CARRIES_STRUCTURED_OUTPUTS,
}
# Variables of a chat template that a client must not set. Nor may it give a template: an endless one would block all.
_RESERVED_VARIABLES = {"chat_template", "conversation", "messages", "tokenize", "tools"}
# vLLM takes them as numbers of 32 bits.
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_MAXIMUM_CHOICES = 128
# All of them are searched for at every token.
_MAXIMUM_STOPS = 128
# With more, a worker with vLLM's V2 runner raises an error that ends its engine, and that of every instance which the
# request then goes to (v1/worker/gpu/sample/logit_bias.py, 0.32); of 128 stop tokens the model's own take some.
_MAXIMUM_BIASED_TOKENS = 1024
_MAXIMUM_STOP_TOKENS = 120
# A body of megabytes can have millions of mistakes; listing them all would delay every stream.
_MAXIMUM_MISTAKES = 100


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: StrictBool = False
    """End the stream with a chunk that holds the usage."""
    continuous_usage_stats: StrictBool = False
    """And put the usage so far into every chunk."""


class GenerationRequest(Body):
    """The fields that chat and text completions share.

    Other fields are taken where vLLM samples with them, refused where they ask for what is not offered
    (`unsupported`), and ignored otherwise.
    """

    model: str | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=_MAXIMUM_CHOICES)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | Listed[str] | None = None
    stop_token_ids: Listed[TokenId] | None = Field(default=None, max_length=_MAXIMUM_STOP_TOKENS)
    include_stop_str_in_output: StrictBool = False
    skip_special_tokens: StrictBool = True
    ignore_eos: StrictBool = False
    min_tokens: int = Field(default=0, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=_MAXIMUM_BIASED_TOKENS)
    allowed_token_ids: Listed[TokenId] | None = Field(default=None, max_length=_MAXIMUM_BIASED_TOKENS)
    bad_words: Listed[str] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    return_token_ids: StrictBool = False
    return_tokens_as_token_ids: StrictBool = False
    request_id: str | None = None
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    vllm_xargs: dict[str, Any] | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _few_mistakes(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(given)
        except ValidationError as error:
            if error.error_count() > _MAXIMUM_MISTAKES:
                count = {"count": error.error_count()}
                raise PydanticCustomError("many_mistakes", "{count} mistakes in this body", count) from None
            raise

    def check_text(self) -> None:
        """Refuse text that no engine can be sent: half a surrogate pair, endless nesting."""
        for name, value in self:
            try:
                msgspec.json.encode({name: value}, enc_hook=lambda options: options.model_dump())
            except UnicodeEncodeError as error:
                raise BadRequestError(f"{name}: {error}", name) from error
            except RecursionError as error:
                raise BadRequestError(f"{name}: nested too deeply", name) from error

    def check_options(self) -> None:
        """Refuse options that would have no effect, and those that engines would refuse."""
        extra = self.model_extra or {}
        unsupported.refuse(extra)
        if extra.get("spaces_between_special_tokens") is False and not self.skip_special_tokens:
            message = "special tokens without spaces between are not offered here"
            raise BadRequestError(message, "spaces_between_special_tokens")
        for token in self.logit_bias or {}:
            if not (token.isascii() and token.isdigit()):
                raise BadRequestError(f"logit_bias: {token!r} is no token id", "logit_bias")
        if self.stream_options is not None and self.stream_options.model_fields_set and not self.stream:
            raise BadRequestError("stream_options needs stream to be true", "stream_options")

    def usage_in_chunks(self) -> bool:
        """Whether every chunk of the stream has the usage so far."""
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats

    def stop_strings(self) -> tuple[str, ...]:
        """Return the stop strings."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in stop:
            raise BadRequestError("a stop string must not be empty", "stop")
        if len(stop) > _MAXIMUM_STOPS:
            raise BadRequestError(f"{len(stop)} stop strings; at most {_MAXIMUM_STOPS} are taken", "stop")
        return tuple(stop)

    def sampling(
        self,
        prompt_tokens: int,
        maximum_model_tokens: int,
        defaults: dict[str, Any],
        restored: Collection[str] = (),
    ) -> Sampling:
        """Return the sampling of one session.

        Parameters
        ----------
        prompt_tokens
            Length of the prompt.
        maximum_model_tokens
            Longest session that the instances take.
        defaults
            Sampling defaults of the model (its generation_config.json).
        restored
            The parts of a moved request's state that all instances restore.

        Raises
        ------
        BadRequestError
            Prompt and limits do not fit.
        """
        room = maximum_model_tokens - prompt_tokens
        if room < 1:
            raise BadRequestError(
                f"the prompt has {prompt_tokens} tokens, but prompt and output together have at most "
                f"{maximum_model_tokens}",
                "messages" if isinstance(self, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        limit = self.limit()
        if limit is not None and limit > room:
            name = "max_completion_tokens" if getattr(self, "max_completion_tokens", None) else "max_tokens"
            raise BadRequestError(
                f"{name}={limit} is too large: the prompt has {prompt_tokens} tokens, and prompt and output "
                f"together have at most {maximum_model_tokens}",
                name,
                "context_length_exceeded",
            )
        maximum = limit if limit is not None else room
        if self.min_tokens > maximum:
            raise BadRequestError(f"min_tokens={self.min_tokens} is above the limit of {maximum}", "min_tokens")
        parameters = dict(defaults)
        for name in _CARRIED_BY_TOKENS | _STATEFUL.keys():
            value = getattr(self, name, None)
            if value is not None and name != "logprobs":
                parameters[name] = value
        parameters |= self._structured()
        if self.vllm_xargs:
            parameters["extra_args"] = self.vllm_xargs
        logprobs = self.logprob_count()
        if logprobs is not None:
            parameters["logprobs"] = logprobs
        # A penalty of 0 is none; a seed of 0 is one.
        stateful = [n for n in _STATEFUL if parameters.get(n) or (n == "seed" and n in parameters)]
        unmovable_reason = next((name for name in stateful if _STATEFUL[name] not in restored), None)
        needs = frozenset(_STATEFUL[name] for name in stateful) if unmovable_reason is None else frozenset()
        return Sampling(parameters, maximum, self.min_tokens, unmovable_reason, needs)

    def _structured(self) -> dict[str, Any]:
        kind = (self.response_format or {}).get("type", "text")
        if kind == "text":
            return {}
        if self.structured_outputs is not None:
            raise BadRequestError("give response_format or structured_outputs, not both", "response_format")
        if kind == "json_object":
            return {"structured_outputs": {"json_object": True}}
        if kind == "json_schema":
            schema = (self.response_format or {}).get("json_schema")
            if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
                raise BadRequestError("response_format.json_schema.schema must be an object", "response_format")
            return {"structured_outputs": {"json": schema["schema"]}}
        raise BadRequestError(f"unknown response_format type {kind!r}", "response_format")

    def limit(self) -> int | None:
        """Return the limit on output tokens that the client set."""
        return self.max_tokens

    def logprob_count(self) -> int | None:
        """Return how many alternatives a token's log probabilities list; None for no log probabilities."""
        raise NotImplementedError


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Listed[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: StrictBool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Listed[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    documents: Listed[dict[str, str]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    add_special_tokens: StrictBool = False

    def check_options(self) -> None:
        """Refuse options that would have no effect."""
        super().check_options()
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message needs add_generation_prompt to be false"
            raise BadRequestError(message, "continue_final_message")
        for name in _RESERVED_VARIABLES & (self.chat_template_kwargs or {}).keys():
            raise BadRequestError(f"chat_template_kwargs.{name} is not the client's to set", "chat_template_kwargs")

    def template_variables(self) -> dict[str, Any]:
        """Return the other variables of the chat template, as vLLM chooses them (`build_chat_params`)."""
        variables = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            variables.setdefault("enable_thinking", self.reasoning_effort != "none")
            variables["reasoning_effort"] = self.reasoning_effort
        if self.documents is not None:
            variables["documents"] = self.documents
        variables["add_generation_prompt"] = self.add_generation_prompt
        variables["continue_final_message"] = self.continue_final_message
        return variables

    def limit(self) -> int | None:
        """Return `max_completion_tokens`, or the older `max_tokens`."""
        return self.max_completion_tokens or self.max_tokens

    def logprob_count(self) -> int | None:
        """Return `top_logprobs` where `logprobs` is on."""
        if not self.logprobs:
            if self.top_logprobs:
                raise BadRequestError("top_logprobs needs logprobs to be true", "top_logprobs")
            return None
        return self.top_logprobs or 0


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: str | Listed[str] | Listed[int] | Listed[Listed[int]]
    max_tokens: int | None = Field(default=16, ge=1)
    add_special_tokens: StrictBool = True
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: StrictBool = False
    best_of: int | None = None

    def logprob_count(self) -> int | None:
        """Return `logprobs`."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, one or several, as text or token ids.

        Raises
        ------
        BadRequestError
            There is none, or a combination is not offered.
        """
        if self.best_of not in (None, self.n):
            raise BadRequestError("best_of must equal n", "best_of")
        if self.echo and self.logprobs is not None:
            raise BadRequestError("echo together with logprobs is not offered", "echo")
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise BadRequestError("the prompt is empty", "prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


def unmovable_parameters(restored: Collection[str]) -> list[str]:
    """Return the parameters of requests that are not moved, where instances restore this (`messages.Hello.carries`)."""
    return [name for name, needed in _STATEFUL.items() if needed not in restored]
