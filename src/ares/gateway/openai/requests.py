"""OpenAI's requests: which are accepted, and their sampling for the engine."""

from collections.abc import Collection, Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ares.gateway.openai import limits, unsupported
from ares.gateway.openai.body import BadRequestError, Body, Listed
from ares.gateway.openai.generation_defaults import GenerationDefaults
from ares.gateway.openai.messages import Message, Tool
from ares.gateway.openai.parsing import OutputFormat
from ares.gateway.openai.sampling import Sampling
from ares.gateway.openai.structured_outputs import ResponseFormat, StructuredOutputs
from ares.protocol.fields import (
    CARRIES_OUTPUT,
    CARRIES_SEED,
    CARRIES_STRUCTURED_OUTPUTS,
    CARRIES_STRUCTURED_OUTPUTS_AFTER_REASONING,
)

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
    "watermarking",
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
    # No parameter: structured outputs that begin where the reasoning ends.
    "structured_outputs_after_reasoning": CARRIES_STRUCTURED_OUTPUTS_AFTER_REASONING,
}
# Variables of a chat template that a client must not set; a template only where the operator trusts clients with it: an
# endless one would block all.
_RESERVED_VARIABLES = {"chat_template", "conversation", "messages", "tokenize", "tools"}


def _no_text(value: Any) -> Any:
    if isinstance(value, str):  # vLLM takes numbers as text elsewhere
        raise ValueError("should be a number")
    return value


# vLLM takes them as numbers of 32 bits.
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Alternatives = Annotated[int, Field(ge=-1), BeforeValidator(_no_text)]
"""Most likely tokens that are listed; -1: all."""
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Argument = str | int | float
_LARGEST_BIAS = 100.0
# Parameters whose fields need more than to be copied.
_MADE_HERE = {"logprobs", "structured_outputs", "repetition_detection", "logit_bias"}
# Characters of which vLLM's cache backends make paths.
_NOT_IN_SALTS = frozenset("@/\\\x00")
_MAXIMUM_SALT = 128
# With it an instance publishes again which blocks it has: gateways would count them twice (pool/cached_blocks.py).
_REPORT_MODE = "kv_cache_report_mode"
# A body of megabytes can have millions of mistakes; listing them all would delay every stream.
_MAXIMUM_MISTAKES = 100


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False
    """End the stream with a chunk that holds the usage."""
    continuous_usage_stats: bool = False
    """And put the usage so far into every chunk."""


class RepetitionDetection(Body):
    """When an output counts as repeating itself, and ends."""

    max_pattern_size: int = Field(default=0, ge=0)
    min_pattern_size: int = Field(default=0, ge=0)
    min_count: int = 0

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.min_pattern_size > self.max_pattern_size:
            raise ValueError("min_pattern_size must not be above max_pattern_size")
        if self.max_pattern_size and self.min_count < 2:
            raise ValueError("min_count must be at least 2")
        return self


class GenerationRequest(Body):
    """The fields that chat and text completions share.

    Types are taken as vLLM takes them: a number may be text, and a flag 0 or 1. Of other fields, those that ask for
    what is not offered are refused (`unsupported`), and the rest are ignored, as vLLM ignores them.
    """

    prompt_field: ClassVar[str] = "prompt"
    limit_field: ClassVar[str] = "max_tokens"

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=limits.MAXIMUM_CHOICES)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0)
    seed: Int64 | None = None
    stop: str | Listed[str] | None = None
    stop_token_ids: Listed[TokenId] | None = Field(default=None, max_length=limits.MAXIMUM_STOP_TOKENS)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=limits.MAXIMUM_BIASED_TOKENS)
    allowed_token_ids: Listed[TokenId] | None = Field(
        default=None, min_length=1, max_length=limits.MAXIMUM_BIASED_TOKENS
    )
    bad_words: Listed[str] | None = None
    watermarking: bool | None = None
    repetition_detection: RepetitionDetection | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, lt=2**63)
    truncation_side: Literal["left", "right"] | None = None
    stream_interval: int | None = Field(default=None, ge=1)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool | None = None
    request_id: str | None = None
    priority: Int64 = 0
    user: str | None = None
    session_id: str | None = None
    length_penalty: float = 1.0
    cache_salt: str | None = Field(default=None, min_length=1, max_length=_MAXIMUM_SALT)
    vllm_xargs: dict[str, _Argument | Listed[_Argument]] | None = None

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

    def check_options(self) -> None:
        """Refuse options that would have no effect, and those that engines would refuse."""
        unsupported.refuse(self.model_extra or {})
        if not self.spaces_between_special_tokens and not self.skip_special_tokens:
            message = "special tokens without spaces between are not offered here"
            raise BadRequestError(message, "spaces_between_special_tokens")
        if self.stream_options is not None and self.stream_options.model_fields_set and not self.stream:
            raise BadRequestError("stream_options needs stream to be true", "stream_options")
        if self.cache_salt is not None and not _NOT_IN_SALTS.isdisjoint(self.cache_salt):
            raise BadRequestError("cache_salt must not contain '@', '/', '\\\\' or NUL", "cache_salt")
        if any(isinstance(n, int) and not -(2**63) <= n < 2**64 for n in _numbers(self.vllm_xargs)):
            raise BadRequestError("vllm_xargs: numbers must fit in 64 bits", "vllm_xargs")
        if _REPORT_MODE in (self.vllm_xargs or ()):
            raise BadRequestError(f"vllm_xargs: {_REPORT_MODE} is not offered here", "vllm_xargs")
        if "" in (self.bad_words or ()):
            raise BadRequestError("a bad word must not be empty", "bad_words")

    def with_usage(self, *, forced: bool = False) -> bool:
        """Whether the stream ends with the usage; `forced` is vLLM's ``--enable-force-include-usage``."""
        return forced or (self.stream_options is not None and self.stream_options.include_usage)

    def usage_in_chunks(self, *, forced: bool = False) -> bool:
        """Whether every chunk of the stream has the usage so far."""
        options = self.stream_options
        return forced or (options is not None and options.include_usage and options.continuous_usage_stats)

    def stop_strings(self) -> tuple[str, ...]:
        """Return the stop strings."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in stop:
            raise BadRequestError("a stop string must not be empty", "stop")
        if len(stop) > limits.MAXIMUM_STOP_STRINGS:
            most = f"at most {limits.MAXIMUM_STOP_STRINGS} are taken (VLLM_MAX_STOP_STRINGS)"
            raise BadRequestError(f"{len(stop)} stop strings; {most}", "stop")
        return tuple(stop)

    def check_model(self, vocabulary: int | None, most_logprobs: int) -> None:
        """Refuse what the model, or its operator, does not allow.

        Parameters
        ----------
        vocabulary
            Number of the model's token ids; None where it is not known.
        most_logprobs
            Most alternatives of a token; -1: the vocabulary.

        Raises
        ------
        BadRequestError
            A token is none of the model's, or too many log probabilities are asked for.
        """
        size = vocabulary or 2**31
        for name in ("stop_token_ids", "allowed_token_ids"):
            if max(getattr(self, name) or [0]) >= size:
                raise BadRequestError(f"{name}: token ids must lie between 0 and {size - 1}", name)
        if max(map(int, self._biases()), default=0) >= size:
            raise BadRequestError(f"logit_bias: token ids must lie between 0 and {size - 1}", "logit_bias")
        asked = self.logprob_count()
        most = size if most_logprobs == -1 else most_logprobs
        if asked is not None and (size if asked == -1 else asked) > most:
            name = "top_logprobs" if isinstance(self, ChatRequest) else "logprobs"
            raise BadRequestError(f"{name}={asked}: at most {most} are given here (--max-logprobs)", name)

    def sampling(
        self,
        prompt_tokens: int,
        maximum_model_tokens: int,
        defaults: GenerationDefaults,
        restored: Collection[str] = (),
        output_format: OutputFormat | None = None,
        most_logprobs: int = 20,
    ) -> Sampling:
        """Return the sampling of one session.

        Parameters
        ----------
        prompt_tokens
            Length of the prompt.
        maximum_model_tokens
            Longest session that the instances take.
        defaults
            What the model, or its operator, sets for requests that do not.
        restored
            The parts of a moved request's state that all instances restore.
        output_format
            How the output is parsed, if it is.
        most_logprobs
            Most alternatives of a token that the instances give (vLLM's ``--max-logprobs``).

        Raises
        ------
        BadRequestError
            Prompt and limits do not fit.
        """
        maximum = self._maximum(prompt_tokens, maximum_model_tokens, defaults)
        parameters = dict(defaults.parameters)
        for name in _CARRIED_BY_TOKENS | _STATEFUL.keys():
            value = getattr(self, name, None)
            if value is not None and name not in _MADE_HERE:
                parameters[name] = value
        if parameters.get("seed") == -1:
            del parameters["seed"]  # vLLM: none
        if self.repetition_detection is not None:
            parameters["repetition_detection"] = self.repetition_detection.model_dump()
        if self.logit_bias:
            parameters["logit_bias"] = self._biases()
        if self.n > 1 and parameters.get("temperature") == 0:
            raise BadRequestError(f"n={self.n} outputs of temperature 0 would all be the same one: give n=1", "n")
        structured = self._structured()
        parameters |= structured if output_format is None else output_format.sampling
        if self.vllm_xargs:
            parameters["extra_args"] = self.vllm_xargs
        logprobs = self.logprob_count()
        if logprobs is not None:
            parameters["logprobs"] = self.requested_logprobs(logprobs, most_logprobs)
        # A penalty of 0 is none; a seed of 0 is one.
        stateful = [n for n in _STATEFUL if parameters.get(n) or (n == "seed" and n in parameters)]
        if output_format is not None and output_format.grammar_after_reasoning:
            stateful.append("structured_outputs_after_reasoning")
        unmovable_reason = next((name for name in stateful if _STATEFUL[name] not in restored), None)
        needs = frozenset(_STATEFUL[name] for name in stateful) if unmovable_reason is None else frozenset()
        return Sampling(
            parameters,
            maximum,
            self.min_tokens,
            unmovable_reason,
            needs,
            cache_salt=self.cache_salt,
            engine_fields={} if output_format is None else output_format.engine_fields,
        )

    def _maximum(self, prompt_tokens: int, longest: int, defaults: GenerationDefaults) -> int:
        """Return the most output tokens, as vLLM chooses them (`get_max_tokens`)."""
        limit = self.limit()
        if limit is not None and limit > longest:
            name = self.limit_field if getattr(self, "max_completion_tokens", None) else "max_tokens"
            message = f"{name}={limit} is too large: prompt and output together have at most {longest} tokens"
            raise BadRequestError(message, name, "context_length_exceeded")
        room = longest - prompt_tokens
        if room < 1:
            raise BadRequestError(
                f"the prompt has {prompt_tokens} tokens, but prompt and output together have at most {longest}",
                self.prompt_field,
                "context_length_exceeded",
            )
        maximum = defaults.limit(limit, room)
        if self.min_tokens > maximum:
            raise BadRequestError(f"min_tokens={self.min_tokens} is above the limit of {maximum}", "min_tokens")
        return maximum

    def _biases(self) -> dict[str, float]:
        """Return `logit_bias` with the bounds of vLLM's own API, which the instances' token-level one lacks."""
        biases = {}
        for key, bias in (self.logit_bias or {}).items():
            try:
                token = int(key)
            except ValueError:
                token = -1
            if not 0 <= token < 2**31:
                raise BadRequestError(f"logit_bias: {key[:40]!r} is no token id", "logit_bias")
            biases[str(token)] = min(_LARGEST_BIAS, max(-_LARGEST_BIAS, bias))
        return biases

    def _structured(self) -> dict[str, Any]:
        wanted = self.response_format.constraint() if self.response_format is not None else None
        if wanted is None:
            given = self.structured_outputs
            return {} if given is None else {"structured_outputs": given.parameters()}
        if self.structured_outputs is not None:
            raise BadRequestError("give response_format or structured_outputs, not both", "response_format")
        return {"structured_outputs": wanted}

    def limit(self) -> int | None:
        """Return the limit on output tokens that the client set."""
        return self.max_tokens

    def logprob_count(self) -> int | None:
        """Return how many alternatives a token's log probabilities list; None for no log probabilities."""
        raise NotImplementedError

    def requested_logprobs(self, count: int, most: int) -> int:
        """Return how many alternatives the instances are asked for."""
        return count


class NamedFunction(Body):
    """The function of a tool."""

    name: str = Field(min_length=1)


class NamedToolChoice(Body):
    """The one tool that the model must call."""

    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    prompt_field: ClassVar[str] = "messages"
    limit_field: ClassVar[str] = "max_completion_tokens"

    messages: Listed[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: Alternatives | None = None
    tools: Listed[Tool] | None = Field(default=None, min_length=1)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    documents: Listed[dict[str, str]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    return_prompt_text: bool = False

    @classmethod
    def of(cls, body: dict[str, Any]) -> Self:
        """Make a request of a body that another route's request was converted to; BadRequestError where it is wrong."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            # Tools are flat in the other routes' requests.
            path = ".".join(str(part) for part in first["loc"] if part != "function")
            raise BadRequestError(f"{path}: {first['msg']}" if path else first["msg"], path or None) from error

    def check_options(self) -> None:
        """Refuse options that would have no effect."""
        super().check_options()
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message needs add_generation_prompt to be false"
            raise BadRequestError(message, "continue_final_message")
        for name in _RESERVED_VARIABLES & (self.chat_template_kwargs or {}).keys():
            raise BadRequestError(f"chat_template_kwargs.{name} is not the client's to set", "chat_template_kwargs")

    def given(self) -> dict[str, Any]:
        """Return the body as its client gave it, without what is null."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    def check_parsing(self, *, tools: bool, reasoning: bool) -> None:
        """Refuse what needs a parser that is not on: `tools` and `reasoning` are whether calls and it are parsed."""
        if not self.include_reasoning and not reasoning:
            message = "include_reasoning=false requires --reasoning-parser to be set, a flag of this gateway"
            raise BadRequestError(message, "include_reasoning")
        self._check_tools(parsed=tools)

    def _check_tools(self, *, parsed: bool) -> None:
        choice = self.tool_choice or ("auto" if self.tools else "none")
        if choice == "none":
            return
        if self.tools is None:
            raise BadRequestError("When using `tool_choice`, `tools` must be set.", "tool_choice")
        # In the words of vLLM (renderers/online_renderer.py, 0.32).
        if not parsed:
            named = f'"{choice}"' if isinstance(choice, str) else f'function "{choice.function.name}"'
            what, flags = f"tool_choice={named}", "--tool-call-parser"
            if choice == "auto":
                what, flags = '"auto" tool choice', "--enable-auto-tool-choice and --tool-call-parser"
            raise BadRequestError(f"{what} requires {flags} to be set, flags of this gateway", "tool_choice")

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
    max_tokens: int | None = Field(default=16, ge=0)
    add_special_tokens: bool = True
    logprobs: Alternatives | None = None
    echo: bool = False
    best_of: int | None = None

    def logprob_count(self) -> int | None:
        """Return `logprobs`."""
        return self.logprobs

    def requested_logprobs(self, count: int, most: int) -> int:
        """Return one more: the sampled token is listed beside the alternatives, of which an instance leaves one out."""
        return count + 1 if count > 0 and (most == -1 or count < most) else count

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, one or several, as text or token ids.

        Raises
        ------
        BadRequestError
            There is none, or a combination is not offered.
        """
        if self.max_tokens == 0 and not self.echo:
            raise BadRequestError("max_tokens must be at least 1, except with echo", "max_tokens")
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
        if len(self.prompt) > limits.MAXIMUM_PROMPTS:
            most = f"at most {limits.MAXIMUM_PROMPTS} are taken (VLLM_MAX_COMPLETION_PROMPTS)"
            raise BadRequestError(f"{len(self.prompt)} prompts; {most}", "prompt")
        return list(self.prompt)

    def limit(self) -> int | None:
        """Return `max_tokens`; where only the prompt is wanted, its one token is not shown."""
        return self.max_tokens or 1


def _numbers(arguments: dict[str, Any] | None) -> Iterator[Any]:
    """Yield the values of `vllm_xargs`, and those of its lists."""
    for value in (arguments or {}).values():
        yield from value if isinstance(value, list) else [value]


def unmovable_parameters(restored: Collection[str]) -> list[str]:
    """Return the parameters of requests that are not moved, where instances restore this (`messages.Hello.carries`)."""
    return [name for name, needed in _STATEFUL.items() if needed not in restored]
