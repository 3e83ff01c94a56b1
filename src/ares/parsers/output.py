"""One output through vLLM's parser, and what vLLM's chat route makes of the result.

The rules are those of vLLM 0.32 (entrypoints/openai/chat_completion/serving.py): `chat_completion_stream_generator` for
deltas, `chat_completion_full_generator` for a whole message. They differ in places, and so do they here.
"""

from collections.abc import Sequence

from ares.gateway.openai.parsing import MessageDelta, ParsedMessage, ToolCall, ToolCallDelta
from ares.parsers.failures import Failures
from ares.parsers.vllm_api import (
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionRequest,
    DeltaMessage,
    Parser,
    make_tool_call_id,
)


class VllmOutputParser:
    """Parses one output.

    Parameters
    ----------
    parser
        A parser of vLLM that has parsed nothing yet.
    request
        The adjusted request.
    prompt
        Token ids of the prompt: the reasoning may have begun, or ended, in it.
    auto_tools
        Whether tools are called by the model's choice (`--enable-auto-tool-choice`).
    """

    def __init__(
        self,
        parser: Parser,
        request: ChatCompletionRequest,
        prompt: list[int],
        *,
        auto_tools: bool,
        failures: Failures,
    ) -> None:
        self._parser = parser
        self._request = request
        self._prompt = prompt
        self._auto_tools = auto_tools
        self._failures = failures
        self._named = isinstance(request.tool_choice, ChatCompletionNamedToolChoiceParam)
        self._only_first = request.parallel_tool_calls is False
        self._called = False

    def push(self, text: str, ids: list[int], finish_reason: str | None) -> MessageDelta | None:
        """Add the text and token ids of one delta, as `parsing.OutputParser` describes it."""
        with self._failures.named():
            found = self._parser.parse_delta(
                text, ids, self._request, prompt_token_ids=self._prompt, finished=finish_reason is not None
            )
        if found is None:
            if finish_reason is None:
                return None
            found = DeltaMessage()
        calls = found.tool_calls or []
        self._called = self._called or bool(calls)
        if finish_reason == "stop" and self._called and not self._named:
            finish_reason = "tool_calls"
        if self._only_first:
            calls = [call for call in calls if call.index == 0]
        return MessageDelta(
            found.reasoning,
            found.content,
            [
                ToolCallDelta(call.index, call.id, call.function.name, call.function.arguments)
                if call.function is not None
                else ToolCallDelta(call.index, call.id)
                for call in calls
            ],
            finish_reason,
        )

    def whole(self, text: str, ids: list[int], finish_reason: str | None) -> ParsedMessage:
        """Parse a complete output, as `parsing.OutputParser` describes it."""
        request = self._request
        with self._failures.named():
            self._parser.set_prompt_token_ids(self._prompt)
            reasoning, content, found = self._parser.parse(
                text, request, enable_auto_tools=self._auto_tools, model_output_token_ids=ids
            )
        forced = self._named or request.tool_choice == "required"
        by_choice = request.tool_choice == "auto" and self._auto_tools and bool(request.tools)
        calls = found or [] if forced or by_choice else []
        if (by_choice and calls) or (request.tool_choice == "required" and finish_reason == "stop"):
            finish_reason = "tool_calls"
        return ParsedMessage(
            reasoning if request.include_reasoning else None,
            content or "" if forced else content,
            [
                ToolCall(call.id or make_tool_call_id(), call.name, call.arguments)
                for call in calls[: 1 if self._only_first else None]
            ],
            finish_reason,
        )

    def reasoning_tokens(self, ids: Sequence[int]) -> int:
        """Count the tokens of the reasoning."""
        with self._failures.named():
            return int(self._parser.count_reasoning_tokens(ids))
