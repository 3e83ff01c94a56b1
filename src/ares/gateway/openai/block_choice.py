"""The one choice of a reply that is written in blocks: `/v1/responses` and `/v1/messages`."""

from collections.abc import Sequence
from typing import Any

from ares.gateway.openai.blocks import BlockWriter
from ares.gateway.openai.parsed_replies import ParsedChoice
from ares.gateway.openai.parsing import MessageDelta, OutputParser, ParsedMessage, ToolCallDelta
from ares.gateway.pool.delta import Delta, PositionLogprobs


class PlainText:
    """The parser of a model without parsers (`parsing.OutputParser`): all of an output is content."""

    def push(self, text: str, ids: list[int], finish_reason: str | None) -> MessageDelta | None:
        """Add the text of one delta."""
        return MessageDelta(content=text or None, finish_reason=finish_reason)

    def whole(self, text: str, ids: list[int], finish_reason: str | None) -> ParsedMessage:
        """Return a complete output."""
        return ParsedMessage(None, text, [], finish_reason)

    def reasoning_tokens(self, ids: Sequence[int]) -> int:
        """Return 0: no reasoning is split off."""
        return 0


class BlockChoice(ParsedChoice):
    """Takes tokens in and has a writer write what they add to the message.

    Parameters
    ----------
    writer
        Writes the events of a stream, and collects the blocks.
    parser
        Parses the output.
    """

    def __init__(self, *choice: Any, writer: BlockWriter, parser: OutputParser, **options: Any) -> None:
        super().__init__(*choice, parser=parser, **options)
        self._writer = writer
        # Of tokens that have no text yet.
        self._held_logprobs: list[PositionLogprobs] = []

    def stream(self, batch: list[Delta]) -> bytes:
        """Add tokens and return their events."""
        for delta in batch:
            text, content, ids = self._take(delta)
            self._held_logprobs += content or []
            found = self._push(text, ids)
            if found is not None:
                self.finish_reason = found.finish_reason
                self._add_message(found)
            if self.finish_reason is not None:
                break
        return self._writer.take_events()

    def parse_whole(self) -> None:
        """Give the writer the message of a reply that is sent as a whole."""
        parsed = self._parser.whole("".join(self._parts), self._ids, self.finish_reason)
        self.finish_reason = parsed.finish_reason
        calls = [ToolCallDelta(n, call.id, call.name, call.arguments) for n, call in enumerate(parsed.tool_calls)]
        if parsed.reasoning:
            self._writer.add(MessageDelta(reasoning=parsed.reasoning))
        self._held_logprobs = self._all_logprobs
        self._add_message(MessageDelta(content=parsed.content, tool_calls=calls, finish_reason=parsed.finish_reason))

    def _add_message(self, found: MessageDelta) -> None:
        logprobs: list[dict[str, Any]] = []
        if found.content or found.finish_reason is not None:
            rendered = self._rendered(self._held_logprobs)
            logprobs = rendered["content"] if rendered else []
        # Those of reasoning and of calls are shown nowhere.
        if logprobs or found.reasoning or found.tool_calls:
            self._held_logprobs = []
        self._writer.add(found, logprobs)
