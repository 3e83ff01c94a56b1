"""Choices of a chat whose output is parsed: reasoning, content and tool calls apart.

Reasoning is given under two names: `reasoning`, as vLLM 0.32 gives it, and `reasoning_content`, which vLLM gave before,
as DeepSeek's API and SGLang do: many clients read only that one.
"""

import time
from typing import Any

from ares.gateway.openai.parsing import MessageDelta, OutputParser, ParserFailedError, ToolCallDelta
from ares.gateway.openai.replies import Choice, encode, event
from ares.gateway.pool.delta import Delta, PositionLogprobs

_REASONING = ("reasoning", "reasoning_content")
# Some parsers read all of the output again with every token. One whose tokens take longer than this runs in a thread:
# there it gives way to other streams every 5 ms.
_SLOW_S = 0.002


class ParsedChoice(Choice):
    """A choice of a chat, through a parser.

    Parameters
    ----------
    parser
        Parses this choice, and no other.
    hides_reasoning
        Give no reasoning, and nothing that shows it: no token ids, no log probabilities.
    counts_reasoning
        Count the tokens of the reasoning.
    """

    def __init__(
        self, *choice: Any, parser: OutputParser, hides_reasoning: bool, counts_reasoning: bool, **options: Any
    ) -> None:
        if hides_reasoning:
            options |= {"logprobs": None, "token_ids": False}
        self._parser = parser
        self._counts = counts_reasoning
        self._ids: list[int] = []
        # How many tokens have been looked at, and those of the reasoning among them.
        self._counted: tuple[int, int | None] = (0, 0 if counts_reasoning else None)
        super().__init__(*choice, **options)
        reasoning = event(self._chunk(dict.fromkeys(_REASONING, "\0"), None, None))
        self._reasoning_parts = reasoning.split(b'"\\u0000"')

    @property
    def reasoning_tokens(self) -> int | None:
        """Tokens of the reasoning so far; None where they are not counted, or cannot be."""
        tokens, reasoning = self._counted
        if self._counts and tokens != len(self._ids):
            try:
                reasoning = self._parser.reasoning_tokens(self._ids)
            except ParserFailedError:
                reasoning = None
            self._counted = len(self._ids), reasoning
        return reasoning

    def stream_token(self, token_id: int) -> bytes:
        """Return nothing: all tokens go through the parser."""
        return b""

    def stream(self, batch: list[Delta]) -> bytes:
        """Add tokens and return their chunks."""
        chunks = []
        for delta in batch:
            before = self._detokenizer.tokens
            gathered = self._gather(*self._take(delta), self._detokenizer.tokens - before)
            if gathered is None:
                continue
            text, content, ids = gathered
            found = self._push(text, ids)
            if found is None and (content is not None or self._token_ids):
                found = MessageDelta()  # all tokens are in the reply
            if found is not None:
                chunks.append(self._render_delta(found, content, ids))
            if self.finish_reason is not None:
                break
        return b"".join(chunks)

    def collect(self, batch: list[Delta]) -> None:
        """Add tokens for a reply that is sent as a whole."""
        for delta in batch:
            text, content, _ = self._take(delta)
            self._parts.append(text)
            self._all_logprobs += content or []
            if self.finish_reason is not None:
                return

    def whole(self, prefix: str = "") -> dict[str, Any]:
        """Return the choice of a reply that is sent as a whole."""
        parsed = self._parser.whole("".join(self._parts), self._ids, self.finish_reason)
        self.finish_reason = parsed.finish_reason
        self._all_ids = self._ids
        choice = super().whole(prefix)
        message: dict[str, Any] = {"role": self._options.role, "content": parsed.content}
        message |= dict.fromkeys(_REASONING, parsed.reasoning)
        if parsed.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in parsed.tool_calls
            ]
        return {**choice, "message": message}

    def _push(self, text: str, ids: list[int]) -> MessageDelta | None:
        began = time.perf_counter()
        found = self._parser.push(text, ids, self.finish_reason)
        self.slow = time.perf_counter() - began > _SLOW_S
        return found

    def _take(self, delta: Delta) -> tuple[str, list[PositionLogprobs] | None, list[int]]:
        before = self._detokenizer.tokens
        text, content = self._add(delta)
        ids = (delta.token_ids or [])[: self._detokenizer.tokens - before]
        self._ids += ids
        return text, content, ids

    def _render_delta(self, found: MessageDelta, content: list[PositionLogprobs] | None, ids: list[int]) -> bytes:
        self.finish_reason = found.finish_reason
        if self.finish_reason is None and content is None and self._plain and not found.tool_calls:
            if found.content is not None and found.reasoning is None:
                return self._before + encode(found.content) + self._after
            if found.reasoning is not None and found.content is None:
                return encode(found.reasoning).join(self._reasoning_parts)
        delta: dict[str, Any] = {}
        if found.reasoning is not None:
            delta |= dict.fromkeys(_REASONING, found.reasoning)
        if found.content is not None:
            delta["content"] = found.content
        if found.tool_calls:
            delta["tool_calls"] = [_call(call) for call in found.tool_calls]
        return event(self._chunk(delta, content, ids))


def _call(call: ToolCallDelta) -> dict[str, Any]:
    """Return what is new of a tool call in OpenAI's form."""
    function = {name: value for name in ("name", "arguments") if (value := getattr(call, name)) is not None}
    head = {} if call.id is None else {"id": call.id, "type": "function"}
    return {"index": call.index, **head, "function": function}
