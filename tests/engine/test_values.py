"""Values of fields: the gateway takes those that vLLM takes, and refuses those that vLLM refuses."""

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest as VllmCompletion
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.exceptions import VLLMValidationError

from ares.gateway.openai import unsupported
from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.generation_defaults import GenerationDefaults
from ares.gateway.openai.requests import ChatRequest, CompletionRequest

VOCABULARY, LONGEST, PROMPT = 1000, 100, 10
MODEL: Any = SimpleNamespace(
    max_model_len=LONGEST, max_logprobs=20, is_diffusion=False, get_vocab_size=lambda: VOCABULARY
)
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 0.5, -0.5, 1.5, 2.0, 1e-9, 1e9, 2**31, 2**63 - 1, 2**63, -(2**63) - 1),
    *("", "1", "yes", "x", [], [1], ["a"], [-1], [None], {}, {"1": 1}, {"a": 1}),
]
# What is about the field itself: what vLLM takes, its bounds, and beyond them.
OWN: dict[str, list[Any]] = {
    "allowed_token_ids": [[5, 6], [999], [1000], list(range(900)), "5", ["5"]],
    "bad_words": [["a", "b"], ["a", ""], "a"],
    "cache_salt": ["abc", "a" * 128, "a" * 129, "a@b", "a/b", "a\\b", "a\0b"],
    "chat_template_kwargs": [{"a": None}, {"enable_thinking": False}],
    "documents": [[{"title": "a", "text": "b"}], [{"title": 1}], ["a"]],
    "echo": [True, "true"],
    "frequency_penalty": [2, 2.1, -2, -2.1, "1"],
    "logit_bias": [{"5": 1000}, {"999": -1}, {"1000": 1}, {"-1": 1}, {" 5 ": 1}, {"5.0": 1}, {"5": "1"}, {"5": None}],
    "logprobs": [5, 20, 21, -1, -2, "5"],
    "max_completion_tokens": [10, 90, 95, 100, 101],
    "max_tokens": [10, 90, 95, 100, 101],
    "min_p": [1, 1.1],
    "min_tokens": [16, 17, 90, 91],
    "n": [16384, 16385, 3],
    "presence_penalty": [2, 2.1, -2, -2.1],
    "priority": [5, -5, "5"],
    "reasoning_effort": ["none", "max", "some"],
    "repetition_detection": [
        *({"max_pattern_size": 3, "min_count": 2}, {"max_pattern_size": 3}, {"min_pattern_size": 1}),
        *({"max_pattern_size": -1}, {"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}),
    ],
    "repetition_penalty": [1.2, 0, -1],
    "response_format": [
        *({"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}, {"type": "xml"}, {"type": None}),
        *({"type": "json_schema", "json_schema": s} for s in (None, {}, {"schema": {}}, {"name": "a"})),
        *(
            {"type": "json_schema", "json_schema": {"name": "a", "schema": s}}
            for s in ({}, None, True, {"type": "object"})
        ),
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"default": None}, "strict": None}},
        {"type": "structural_tag", "structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}], "triggers": ["<f>"]},
        {"type": "structural_tag", "structures": [{"begin": "<f>"}], "triggers": ["<f>"]},
        {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {"type": "object"}}},
        {"type": "structural_tag"},
    ],
    "seed": [-5, -(2**63), 7],
    "stop": ["a", ["a", "b"], ["a"] * 4, ["a"] * 5, ["a", ""]],
    "stop_token_ids": [[5, 5], [999], [1000], ["5"]],
    "stream_interval": [3],
    "structured_outputs": [
        *({"json": {}}, {"json": "{}"}, {"json": ""}, {"json": True}, {"regex": "a+"}, {"regex": ""}, {"regex": "\0"}),
        *({"choice": ["a"]}, {"choice": []}, {"grammar": 'root ::= "a"'}, {"grammar": " "}, {"json_object": True}),
        *({"json_object": False}, {"json": {}, "regex": "a"}, {"regex": "a", "json": None}, {"structural_tag": ""}),
        *({"disable_any_whitespace": True}, {"json": {}, "disable_any_whitespace": True, "whitespace_pattern": None}),
    ],
    "temperature": [2, 2.1, "0.5"],
    "top_k": [-2, 10**9],
    "top_logprobs": [5],
    "top_p": [1, 1.1, "0.5"],
    "truncate_prompt_tokens": [5, 100, 101, -2],
    "truncation_side": ["left", "right", "top"],
    "vllm_xargs": [
        {"a": "b", "c": [1, "d"]},
        {"a": {"b": 1}},
        {"a": 2**64},
        {"a": -(2**63)},
        {"a": [2**64]},
        {"a": None},
    ],
    "watermarking": [False],
}
# The gateway decides these otherwise, on purpose: it offers less, and says so, or takes null as absent everywhere.
OTHERWISE = {*unsupported.refused(), "tools", "tool_choice", "messages", "prompt", "request_id", "chat_template"}
# Limits of the V2 runner, beyond which it would end the engine (gateway/openai/limits.py).
RUNNER = {"stop_token_ids": 120, "allowed_token_ids": 1024, "logit_bias": 1024}


def ours(body: dict[str, Any], *, chat: bool) -> str | None:
    """Return why the gateway refuses a body; None where it takes it."""
    try:
        request: Any = (ChatRequest if chat else CompletionRequest).model_validate(copy.deepcopy(body))
        request.check_options()
        request.check_model(VOCABULARY, 20)
        request.stop_strings()
        if not chat:
            request.prompts()
        if (request.truncate_prompt_tokens or 0) > LONGEST:
            return "truncate_prompt_tokens"
        request.sampling(PROMPT, LONGEST, GenerationDefaults())
    except (ValueError, BadRequestError) as error:
        return repr(error)
    return None


def theirs(body: dict[str, Any], *, chat: bool) -> str | None:
    """Return why vLLM refuses a body, before its engine looks at it; None where it takes it."""
    try:
        request: Any = (ChatCompletionRequest if chat else VllmCompletion).model_validate(copy.deepcopy(body))
        request.build_tok_params(MODEL)
        limit = request.max_tokens
        if chat and request.max_completion_tokens is not None:
            limit = request.max_completion_tokens
        most = get_max_tokens(LONGEST, limit, PROMPT, {}, None, request.truncate_prompt_tokens)
        sampling = request.to_sampling_params(most, {})
        sampling.verify(MODEL, None, None, None)
        checked_by_the_engine(sampling.structured_outputs)
    except (ValueError, VLLMValidationError, AttributeError, TypeError) as error:  # the last two: a 500 of vLLM
        return repr(error)
    return None


def checked_by_the_engine(wanted: Any) -> None:
    """Refuse structured outputs that vLLM refuses before it makes a grammar (`_validate_structured_outputs`)."""
    if wanted is None:
        return
    texts = [text for text in (wanted.json, wanted.grammar, wanted.structural_tag) if isinstance(text, str)]
    if (
        wanted.choice == []
        or wanted.json_object is False
        or not all(map(str.strip, texts))
        or "\0" in (wanted.regex or "")
    ):
        raise ValueError("structured_outputs")


def bodies(chat: bool) -> list[tuple[str, Any]]:
    request: Any = ChatCompletionRequest if chat else VllmCompletion
    names = sorted(request.model_fields.keys() - OTHERWISE)
    assert len(names) > 35
    return [(name, value) for name in names for value in (*ODD, *OWN.get(name, []))]


def base(name: str, chat: bool) -> dict[str, Any]:
    """Return a body in which a field may be given at all."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    if name == "top_logprobs":
        body["logprobs"] = True
    if name == "continue_final_message":
        body["add_generation_prompt"] = False
    if name == "stream_options":
        body["stream"] = True
    return body


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
def test_the_same_values_are_taken(chat: bool) -> None:
    wrong, taken, refused = [], 0, 0
    for name, value in bodies(chat):
        body = base(name, chat) | {name: value}
        made, wanted = ours(body, chat=chat), theirs(body, chat=chat)
        taken, refused = taken + (wanted is None), refused + (wanted is not None)
        if value is None and made is None:
            continue  # null is absent, where vLLM refuses it too
        if made is not None and wanted is None and len(value) > RUNNER.get(name, len(value)):
            continue
        if (made is None) != (wanted is None):
            wrong.append(f"{name}={json.dumps(value)[:80]}: here {made or 'taken'}, vLLM {wanted or 'taken'}")
    assert not wrong, "\n".join(wrong)
    assert taken > 300 < refused


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2, "temperature": 0},
        {"n": 2, "temperature": 1e-9},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_usage": None}},
        {"stream": True, "stream_options": {"include_usage": "yes", "more": 1}},
        {"max_tokens": 5, "min_tokens": 6},
        {"max_tokens": 95, "min_tokens": 91},
        {"temperature": 0, "top_k": -1, "top_p": 1, "min_p": 0},
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        {"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}},
        {"logit_bias": {}, "stop": None, "stop_token_ids": None, "seed": -1, "n": 3},
    ],
)
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
def test_the_same_combinations_are_taken(chat: bool, fields: dict[str, Any]) -> None:
    body = base("", chat) | fields
    assert (ours(body, chat=chat) is None) == (theirs(body, chat=chat) is None), theirs(body, chat=chat)


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": True, "max_tokens": 0},
        {"max_tokens": 0},
        {"prompt": []},
        {"prompt": ""},
        {"prompt": ["a"] * 1024},
        {"prompt": ["a"] * 1025},
        {"prompt": [1] * 1025},
        {"prompt": [1.0, 2]},
        {"prompt": [[1], "a"]},
        {"prompt": ["a", [1]]},
        {"prompt": [True]},
    ],
)
def test_the_same_prompts_are_taken(fields: dict[str, Any]) -> None:
    body = base("", chat=False) | fields
    if fields.get("prompt") in ("", []):
        assert theirs(body, chat=False) is not None or fields["prompt"] == []
        return  # the gateway sees that a prompt is empty when it tokenises it
    assert (ours(body, chat=False) is None) == (theirs(body, chat=False) is None), theirs(body, chat=False)


def test_what_the_engine_is_asked_for() -> None:
    """The sampling parameters of a body are vLLM's own."""
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.1,
        "frequency_penalty": 1,
        "presence_penalty": -1,
        "repetition_penalty": 1.1,
        "seed": -5,
        "stop_token_ids": [5, 5],
        "logit_bias": {"5": 1000, " 6": -1000, "7": 0.5},
        "allowed_token_ids": [5, 6],
        "bad_words": ["a"],
        "ignore_eos": "true",
        "watermarking": False,
        "min_tokens": 3,
        "vllm_xargs": {"a": [1, "b"]},
        "repetition_detection": {"max_pattern_size": 3, "min_count": 2},
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"default": None}}},
    }
    body = base("", chat=True) | fields
    made = ChatRequest.model_validate(copy.deepcopy(body)).sampling(PROMPT, LONGEST, GenerationDefaults()).parameters
    wanted = ChatCompletionRequest.model_validate(copy.deepcopy(body)).to_sampling_params(90, {})
    made["logit_bias"] = {int(token): bias for token, bias in made["logit_bias"].items()}
    made["stop_token_ids"] = list(dict.fromkeys(made["stop_token_ids"]))
    for name in made:
        value = getattr(wanted, name)
        if name in ("repetition_detection", "structured_outputs"):
            value = {key: getattr(value, key) for key in made[name]}
        assert made[name] == value, name
    for name in fields.keys() - {"response_format", "vllm_xargs", "min_tokens"}:
        assert name in made
