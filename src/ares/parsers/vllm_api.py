"""Every name of vLLM that the parsers use, read from vLLM 0.32.0."""

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionNamedToolChoiceParam, ChatCompletionRequest
from vllm.entrypoints.openai.parser.harmony_utils import (
    build_harmony_preamble,
    extract_instructions_from_messages,
    parse_chat_inputs_to_harmony_messages,
    render_for_completion,
)
from vllm.entrypoints.openai.parser.harmony_utils import get_encoding as get_harmony_encoding
from vllm.exceptions import VLLMValidationError
from vllm.parser import Parser, ParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.tokenizers import TokenizerLike, get_tokenizer
from vllm.tool_parsers import ToolParserManager

__all__ = [
    "ChatCompletionNamedToolChoiceParam",
    "ChatCompletionRequest",
    "DeltaMessage",
    "Parser",
    "ParserManager",
    "ReasoningParserManager",
    "TokenizerLike",
    "ToolParserManager",
    "VLLMValidationError",
    "build_harmony_preamble",
    "extract_instructions_from_messages",
    "get_harmony_encoding",
    "get_tokenizer",
    "make_tool_call_id",
    "parse_chat_inputs_to_harmony_messages",
    "reasoning_parsers",
    "render_for_completion",
    "tool_parsers",
]


def tool_parsers() -> list[str]:
    """Return the names of the tool parsers."""
    return list(ToolParserManager.list_registered())


def reasoning_parsers() -> list[str]:
    """Return the names of the reasoning parsers."""
    return list(ReasoningParserManager.list_registered())
