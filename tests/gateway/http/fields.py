"""Every field of a request that is honoured: a value of it, and the body in which it has an effect."""

from typing import Any, NamedTuple


class Case(NamedTuple):
    """A field with a value, and the rest of the body."""

    field: str
    value: Any
    rest: dict[str, Any]


def _case(field: str, value: Any, **rest: Any) -> Case:
    return Case(field, value, rest)


_STREAM: dict[str, Any] = {"stream": True}
_BOTH = [
    _case("allowed_token_ids", [5]),
    _case("bad_words", ["x"]),
    _case("cache_salt", "salt"),
    _case("frequency_penalty", 1),
    _case("ignore_eos", True),
    _case("include_stop_str_in_output", True, stop=["\x00"], max_tokens=400),
    _case("logit_bias", {"5": 1}),
    _case("max_tokens", 3),
    _case("min_p", 0.1),
    _case("min_tokens", 5),
    _case("model", "nothing"),
    _case("n", 2),
    _case("presence_penalty", 1),
    _case("priority", 7),
    _case("repetition_detection", {"max_pattern_size": 2, "min_count": 2}),
    _case("repetition_penalty", 1.1),
    _case("request_id", "mine"),
    _case("response_format", {"type": "json_object"}),
    _case("return_token_ids", True),
    _case("return_tokens_as_token_ids", True, logprobs=1),
    _case("seed", 5),
    _case("skip_special_tokens", False, max_tokens=400),
    _case("spaces_between_special_tokens", False, skip_special_tokens=False),
    _case("stop", ["\x00"], max_tokens=400),
    _case("stop_token_ids", [7]),
    _case("stream", True),
    _case("stream_interval", 3, **_STREAM),
    _case("stream_options", {"include_usage": True}, **_STREAM),
    _case("structured_outputs", {"regex": "a"}),
    _case("temperature", 0.5),
    _case("top_k", 5),
    _case("top_p", 0.5),
    _case("truncate_prompt_tokens", 2),
    _case("truncation_side", "right", truncate_prompt_tokens=2),
    _case("vllm_xargs", {"a": 1}),
    _case("watermarking", False),
]
_MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
CHAT = [
    *_BOTH,
    _case("add_generation_prompt", False),
    _case("add_special_tokens", True),
    _case("chat_template", "{{ messages }}"),
    _case("chat_template_kwargs", {"enable_thinking": False}),
    _case("continue_final_message", True, messages=_MESSAGES, add_generation_prompt=False),
    _case("documents", [{"title": "a"}]),
    _case("logprobs", True),
    _case("max_completion_tokens", 3),
    _case("messages", _MESSAGES),
    _case("reasoning_effort", "none"),
    _case("return_prompt_text", True),
    _case("top_logprobs", 2, logprobs=True),
]
COMPLETION = [
    *_BOTH,
    _case("add_special_tokens", False),
    _case("echo", True),
    _case("logprobs", 2),
    _case("prompt", "Ho"),
]
OF_PARSERS = {"include_reasoning", "parallel_tool_calls", "tool_choice", "tools"}
"""Fields of the parsers of reasoning and tool calls; their own tests show what they do."""
