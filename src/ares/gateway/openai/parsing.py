"""Reasoning and tool calls of an output: what the gateway knows of the parsers that find them (`ares.parsers`).

The gateway sees these types only; the implementation, which imports vLLM, is given to it at start where its flags ask
for one. A parser is part of a stream for its whole life, as the detokenizer is: a move cannot be seen in its deltas.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec


class ParserFailedError(Exception):
    """A parser raised an error on an output of the model; the message names the parser and its error."""

    code = "parser_failed"


class ToolCallDelta(msgspec.Struct):
    """What is new of one tool call; the first delta of a call has its id and the name of the function."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str | None = None


class MessageDelta(msgspec.Struct):
    """What new tokens add to a message.

    Attributes
    ----------
    finish_reason
        With the last tokens: why the output ended, `tool_calls` where it called tools.
    """

    reasoning: str | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] = []
    finish_reason: str | None = None


class ToolCall(msgspec.Struct):
    """A complete call: `arguments` is the text that the model wrote, JSON if the model made no mistake."""

    id: str
    name: str
    arguments: str


class ParsedMessage(msgspec.Struct):
    """A whole message, and why its output ended."""

    reasoning: str | None
    content: str | None
    tool_calls: list[ToolCall]
    finish_reason: str | None


class OutputParser(Protocol):
    """Parses one output: either delta by delta or as a whole. Its methods raise `ParserFailedError`."""

    def push(self, text: str, ids: list[int], finish_reason: str | None) -> MessageDelta | None:
        """Add the text and token ids of one delta.

        Parameters
        ----------
        finish_reason
            Why the output ends with this delta; None where it does not.

        Returns
        -------
        MessageDelta | None
            What is new; None where nothing can be given out yet. Never None with the last delta.
        """

    def whole(self, text: str, ids: list[int], finish_reason: str | None) -> ParsedMessage:
        """Parse a complete output."""

    def reasoning_tokens(self, ids: Sequence[int]) -> int:
        """Return how many of all tokens of the output so far belong to the reasoning."""


class OutputFormat(Protocol):
    """How the outputs of one request are asked for and parsed.

    Attributes
    ----------
    sampling
        Sampling parameters in place of the request's own: `structured_outputs`, of the request or of its tools.
    engine_fields
        Further fields of the engine's request: `reasoning_ended`, `reasoning_parser_kwargs`.
    grammar_after_reasoning
        Whether the structured outputs begin where the reasoning ends, later than the first token.
    skip_special_tokens
        Whether the parser gets text without special tokens.
    spaces_between_special_tokens
        Whether a tokenizer may put spaces between special tokens that are not skipped.
    hides_reasoning
        Whether the client gets no reasoning, nor token ids and log probabilities, which would show it.
    """

    sampling: dict[str, Any]
    engine_fields: dict[str, Any]
    grammar_after_reasoning: bool
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    hides_reasoning: bool

    def parser(self) -> OutputParser:
        """Return a parser for one output; raises `ParserFailedError`."""


class Parsers(Protocol):
    """The parsers of the served model.

    Attributes
    ----------
    calls_tools
        Whether tool calls are parsed.
    splits_reasoning
        Whether reasoning is split off, and its tokens are counted apart.
    """

    calls_tools: bool
    splits_reasoning: bool

    def render(self, chat: dict[str, Any], *, tools: bool) -> list[int] | None:
        """Return the prompt of a chat whose format is no chat template (Harmony); None where the template renders it.

        Parameters
        ----------
        chat
            The body of a chat request, as its client gave it.
        tools
            Whether the model sees the tools.

        Raises
        ------
        BadRequestError
            The format refuses the chat.
        """

    def output_format(self, chat: dict[str, Any], prompt: list[int]) -> OutputFormat:
        """Return how the outputs of a chat are asked for and parsed.

        Parameters
        ----------
        chat
            The body of a chat request, as its client gave it.
        prompt
            Its prompt's token ids.

        Raises
        ------
        BadRequestError
            vLLM refuses the request; `param` names the field.
        """
