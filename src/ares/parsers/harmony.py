"""Prompts in OpenAI's Harmony format (gpt-oss), as vLLM 0.32 renders them (renderers/online_renderer.py)."""

from ares.config import ConfigError
from ares.gateway.openai.body import BadRequestError
from ares.parsers.vllm_api import (
    ChatCompletionRequest,
    build_harmony_preamble,
    extract_instructions_from_messages,
    get_harmony_encoding,
    parse_chat_inputs_to_harmony_messages,
    render_for_completion,
)

_VOCABULARY = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"


def load_vocabulary() -> None:
    """Load the vocabulary of the format; ConfigError where it is neither here nor can be fetched."""
    try:
        get_harmony_encoding()
    except BaseException as error:  # what the library's Rust code raises may be no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ConfigError(
            f"the vocabulary of the Harmony format cannot be loaded ({error}): download "
            f"{_VOCABULARY} into a folder, and "
            "set the variable TIKTOKEN_ENCODINGS_BASE to that folder"
        ) from error


def render(request: ChatCompletionRequest, *, tools: bool) -> list[int]:
    """Return the prompt of a chat; BadRequestError where the format has no place for a part of it.

    `tools` is whether the model sees the tools.
    """
    if request.reasoning_effort == "none":
        raise BadRequestError("Harmony does not support reasoning_effort='none'", "reasoning_effort")
    try:
        instructions, rest = extract_instructions_from_messages(list(request.messages))
        preamble = build_harmony_preamble(
            instructions=instructions,
            tools=request.tools if tools else None,
            reasoning_effort=request.reasoning_effort,
            with_custom_tools=tools,
        )
        return list(render_for_completion([*preamble, *parse_chat_inputs_to_harmony_messages(rest)]))
    except Exception as error:  # the library's errors have no common class
        raise BadRequestError(f"the Harmony format refuses these messages: {error}", "messages") from error
