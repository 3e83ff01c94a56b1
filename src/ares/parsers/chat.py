"""The parsers of a model: how a chat is asked for, and parsers for its outputs, as in vLLM 0.32's chat route.

What a parser sets in a request (`adjust_request`) is passed on: the grammar of forced tool calls, whether text has
special tokens. Sources: renderers/online_renderer.py (`preprocess_chat`), entrypoints/scale_out/render/serving.py.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ares.config import ConfigError, GatewayConfig
from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.tokenizer import tokenizer_folder
from ares.parsers import harmony
from ares.parsers.failures import Failures
from ares.parsers.model import ModelFacts
from ares.parsers.output import VllmOutputParser
from ares.parsers.vllm_api import ChatCompletionRequest, Parser, ParserManager, VLLMValidationError, get_tokenizer

logger = logging.getLogger(__name__)


class ChatParsers:
    """The parsers that a gateway's flags name, for its model (`parsing.Parsers`).

    Raises
    ------
    ConfigError
        They do not fit the model, or each other.
    """

    def __init__(self, config: GatewayConfig, folder: Path) -> None:
        self._facts = ModelFacts(folder)
        self._default_variables = config.default_chat_template_kwargs
        if self._facts.harmony:
            harmony.load_vocabulary()
        # As transformers makes it, which is what the gateway encodes and decodes with.
        tokenizer = tokenizer_folder(config.tokenizer) if config.tokenizer else folder
        self._tokenizer = get_tokenizer(str(tokenizer), tokenizer_mode="hf")
        self._auto_tools = config.enable_auto_tool_choice
        names = [name for name in (config.reasoning_parser, config.tool_call_parser) if name is not None]
        self.name = " and ".join(dict.fromkeys(names))
        self._failures = Failures(self.name)
        try:
            made = ParserManager.get_parser(
                tool_parser_name=config.tool_call_parser,
                reasoning_parser_name=config.reasoning_parser,
                enable_auto_tools=config.enable_auto_tool_choice,
                tool_strict_level=config.tool_strict_level,
                model_name=config.model,
                is_harmony=self._facts.harmony,
                tokenizer=self._tokenizer,
            )
        except Exception as error:  # parsers check the tokenizer each in its own way
            raise ConfigError(f"the parser {self.name} cannot be used with {config.model}: {error}") from error
        assert made is not None  # noqa: S101 - one is named
        self._class: type[Parser] = made
        self.calls_tools = made.tool_parser_cls is not None
        self.splits_reasoning = made.reasoning_parser_cls is not None

    def render(self, chat: dict[str, Any], *, tools: bool) -> list[int] | None:
        """Return the prompt of a chat in the Harmony format; None where the chat template renders it."""
        return harmony.render(_read(chat), tools=tools) if self._facts.harmony else None

    def output_format(self, chat: dict[str, Any], prompt: list[int]) -> "ChatFormat":
        """Return how the outputs of a chat are asked for and parsed."""
        request = _read(chat)
        asked = request.build_chat_params(None, "auto").with_defaults(self._default_variables)
        variables = asked.chat_template_kwargs

        def parser() -> Parser:
            return self._class(self._tokenizer, request.tools, chat_template_kwargs=variables, model_config=self._facts)

        adjusting = (
            self._facts.harmony
            or self._class.always_adjust_request
            or self.splits_reasoning
            or request.tool_choice != "none"
        )
        try:
            if adjusting:
                request = parser().adjust_request(request)
            with self._failures.named():
                ended = request.resolve_reasoning_ended(parser() if self.splits_reasoning else None, prompt)
        except VLLMValidationError as error:
            raise _refusal(error) from error
        except ValueError as error:  # of a schema that no grammar can be made of
            raise BadRequestError(str(error)) from error
        engine_fields: dict[str, Any] = {} if ended is None else {"reasoning_ended": ended}
        if self.splits_reasoning:
            engine_fields["reasoning_parser_kwargs"] = {"chat_template_kwargs": variables}
        return ChatFormat(self, request, variables, prompt, _structured(request), engine_fields, ended)

    def output_parser(
        self, request: ChatCompletionRequest, variables: dict[str, Any], prompt: list[int]
    ) -> VllmOutputParser:
        """Return a parser for one output of an adjusted request."""
        with self._failures.named():
            made = self._class(self._tokenizer, request.tools, chat_template_kwargs=variables, model_config=self._facts)
        return VllmOutputParser(made, request, prompt, auto_tools=self._auto_tools, failures=self._failures)


class ChatFormat:
    """How the outputs of one chat are asked for and parsed (`parsing.OutputFormat`)."""

    def __init__(
        self,
        parsers: ChatParsers,
        request: ChatCompletionRequest,
        variables: dict[str, Any],
        prompt: list[int],
        structured_outputs: dict[str, Any] | None,
        engine_fields: dict[str, Any],
        reasoning_ended: bool | None,
    ) -> None:
        self._parsers = parsers
        self._request = request
        self._variables = variables
        self._prompt = prompt
        self.sampling = {} if structured_outputs is None else {"structured_outputs": structured_outputs}
        self.engine_fields = engine_fields
        self.grammar_after_reasoning = structured_outputs is not None and reasoning_ended is False
        self.skip_special_tokens = bool(request.skip_special_tokens)
        self.spaces_between_special_tokens = bool(request.spaces_between_special_tokens)
        self.hides_reasoning = not request.include_reasoning

    def parser(self) -> VllmOutputParser:
        """Return a parser for one output."""
        return self._parsers.output_parser(self._request, self._variables, self._prompt)


def _read(chat: dict[str, Any]) -> ChatCompletionRequest:
    """Make vLLM's request of a client's body."""
    try:
        return ChatCompletionRequest.model_validate(chat)
    except VLLMValidationError as error:
        raise _refusal(error) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRequestError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}", str(first["loc"][0]) if first["loc"] else None
        ) from error


def _refusal(error: VLLMValidationError) -> BadRequestError:
    return BadRequestError(str(error.args[0]), error.parameter)


def _structured(request: ChatCompletionRequest) -> dict[str, Any] | None:
    """Return the structured outputs of an adjusted request as an instance reads them."""
    structured = request.extract_structured_outputs()
    if structured is None:
        return None
    given = {f.name: getattr(structured, f.name) for f in dataclasses.fields(structured) if not f.name.startswith("_")}
    return {name: value for name, value in given.items() if value is not None and value is not False}
