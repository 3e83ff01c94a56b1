"""What OpenAI's requests mean: checks, defaults, limits, and what may move."""

from typing import Any

import pytest
from pydantic import ValidationError

from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.generation_defaults import GenerationDefaults
from ares.gateway.openai.requests import ChatRequest, CompletionRequest
from ares.gateway.openai.sampling import Sampling

MESSAGES = [{"role": "user", "content": "Hi"}]


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": MESSAGES} | fields)


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "x"} | fields)


def sampling(
    prompt_tokens: int = 10, maximum: int = 100, defaults: dict[str, Any] | None = None, **fields: Any
) -> Sampling:
    return chat(**fields).sampling(prompt_tokens, maximum, GenerationDefaults(defaults or {}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 16385),
        ("n", 1.5),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", float("nan")),
        ("top_k", -2),
        ("min_p", 2),
        ("frequency_penalty", 3),
        ("frequency_penalty", float("nan")),
        ("presence_penalty", -3),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("length_penalty", float("nan")),
        ("logit_bias", {"5": float("nan")}),
        ("logit_bias", {"5": float("-inf")}),
        ("vllm_xargs", {"a": float("nan")}),
        ("vllm_xargs", {"a": [1.0, float("inf")]}),
        ("seed", 2**63),
        ("stop", [1]),
        ("stop_token_ids", ["x"]),
        # More than vLLM's V2 runner takes: its worker would raise, and the engine end.
        ("stop_token_ids", list(range(121))),
        ("allowed_token_ids", list(range(1025))),
        ("logit_bias", {str(token): 1.0 for token in range(1025)}),
        ("stream", 2),
        ("ignore_eos", "maybe"),
        ("min_tokens", -1),
        ("max_tokens", 0),
        ("max_completion_tokens", 0),
        ("logit_bias", [1]),
        ("messages", []),
        ("messages", ["x"]),
        ("logprobs", 3),
        ("top_logprobs", -2),
        ("tool_choice", "x"),
        ("response_format", "json"),
        ("stream_options", {"include_usage": 2}),
    ],
)
def test_a_bad_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as wrong:
        chat(**{field: value})
    assert {error["loc"][0] for error in wrong.value.errors()} == {field}


@pytest.mark.parametrize(
    ("parameters", "pinned"),
    [
        ({}, None),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1}, None),
        ({"repetition_penalty": 1.2, "logit_bias": {"5": 1.0}, "allowed_token_ids": [5]}, None),
        ({"stop": ["x"], "stop_token_ids": [7], "ignore_eos": True, "min_tokens": 3}, None),
        ({"logprobs": True, "top_logprobs": 3}, None),
        ({"frequency_penalty": 0, "presence_penalty": 0.0, "bad_words": []}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"frequency_penalty": 0.1}, "frequency_penalty"),
        ({"presence_penalty": -0.1}, "presence_penalty"),
        ({"seed": 0}, "seed"),
        ({"seed": 7, "frequency_penalty": 1}, "seed"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"repetition_detection": {"max_pattern_size": 3, "min_count": 2}}, "repetition_detection"),
    ],
)
def test_what_keeps_a_request_where_it_is(parameters: dict[str, Any], pinned: str | None) -> None:
    assert sampling(**parameters).unmovable_reason == pinned


def test_state_that_every_instance_restores_keeps_nothing_anywhere() -> None:
    def made(carried: set[str], **fields: Any) -> tuple[str | None, bool]:
        found = chat(**fields).sampling(10, 100, GenerationDefaults(), carried)
        return found.unmovable_reason, found.restored

    everything = {"output", "seed", "structured_outputs"}
    assert made(everything) == (None, False)
    assert made(everything, temperature=0.5) == (None, False)
    assert made(everything, seed=0) == (None, True)
    assert made(everything, seed=7, frequency_penalty=1, response_format={"type": "json_object"}) == (None, True)
    assert made({"output"}, bad_words=["x"]) == (None, True)
    assert made({"output"}, seed=7, presence_penalty=1) == ("seed", False)
    assert made({"seed"}, structured_outputs={"regex": "a+"}) == ("structured_outputs", False)


def test_parameters_reach_the_engine() -> None:
    made = sampling(temperature=0.5, seed=3, logprobs=True, top_logprobs=2, unknown_field=1, user="me", max_tokens=5)
    assert made.parameters == {
        "temperature": 0.5,
        "seed": 3,
        "logprobs": 2,
        "ignore_eos": False,
    }
    assert made.maximum_tokens == 5


def test_the_client_wins_over_the_models_defaults() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9}
    made = sampling(defaults=defaults, temperature=0)
    assert (made.parameters["temperature"], made.parameters["top_p"]) == (0, 0.9)
    assert defaults == {"temperature": 0.6, "top_p": 0.9}


def test_limits() -> None:
    assert sampling().maximum_tokens == 90
    assert sampling(max_tokens=90).maximum_tokens == sampling(max_tokens=95).maximum_tokens == 90
    assert sampling(max_completion_tokens=7, max_tokens=50).maximum_tokens == 7
    assert sampling(max_tokens=8, min_tokens=8).minimum_tokens == 8
    assert completion().sampling(10, 100, GenerationDefaults()).maximum_tokens == 16
    assert completion(max_tokens=None).sampling(10, 100, GenerationDefaults()).maximum_tokens == 16


@pytest.mark.parametrize(
    ("prompt_tokens", "fields", "param", "code"),
    [
        (100, {}, "messages", "context_length_exceeded"),
        (10, {"max_tokens": 101}, "max_tokens", "context_length_exceeded"),
        (10, {"max_completion_tokens": 101}, "max_completion_tokens", "context_length_exceeded"),
        (10, {"n": 2, "temperature": 0}, "n", None),
        (10, {"max_tokens": 5, "min_tokens": 6}, "min_tokens", None),
        (10, {"top_logprobs": 2}, "top_logprobs", None),
        (
            10,
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "response_format",
            None,
        ),
    ],
)
def test_fields_that_do_not_fit(prompt_tokens: int, fields: dict[str, Any], param: str, code: str | None) -> None:
    with pytest.raises(BadRequestError) as wrong:
        sampling(prompt_tokens, **fields)
    assert (wrong.value.param, wrong.value.code, wrong.value.status) == (param, code, 400)


def test_response_formats() -> None:
    schema = {"type": "object"}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert sampling(response_format=form).parameters["structured_outputs"] == {"json": schema}
    made = sampling(response_format={"type": "json_object"})
    assert made.parameters["structured_outputs"] == {"json_object": True}


def test_stop_strings() -> None:
    assert chat().stop_strings() == ()
    assert chat(stop="a").stop_strings() == ("a",)
    assert chat(stop=["a", "b"]).stop_strings() == ("a", "b")
    for empty in ("", ["a", ""]):
        with pytest.raises(BadRequestError) as wrong:
            chat(stop=empty).stop_strings()
        assert wrong.value.param == "stop"
    assert len(chat(stop=["a"] * 4).stop_strings()) == 4
    with pytest.raises(BadRequestError, match="5 stop strings; at most 4 are taken"):
        chat(stop=["a"] * 5).stop_strings()


def test_prompts() -> None:
    assert completion(prompt="a").prompts() == ["a"]
    assert completion(prompt=["a", "b"]).prompts() == ["a", "b"]
    assert completion(prompt=[1, 2]).prompts() == [[1, 2]]
    assert completion(prompt=[[1], [2]]).prompts() == [[1], [2]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 0}, "echo"),
    ],
)
def test_completions_that_are_not_offered(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as wrong:
        completion(**fields).prompts()
    assert wrong.value.param == param


def test_logprobs() -> None:
    assert chat().logprob_count() is None
    assert chat(logprobs=True).logprob_count() == 0
    assert chat(logprobs=True, top_logprobs=5).logprob_count() == 5
    assert completion(logprobs=0).logprob_count() == 0
    assert completion().logprob_count() is None


def test_text_that_no_engine_can_be_sent() -> None:
    chat(
        stream_options={"include_usage": True}, tools=[{"function": {"name": "f", "parameters": {"x": 10**30}}}]
    ).check_text()
    for fields in ({"chat_template_kwargs": {"a": "\ud800"}}, {"extra": ["\udfff"]}):
        with pytest.raises(BadRequestError) as wrong:
            chat(**fields).check_text()
        assert wrong.value.param == next(iter(fields))


def test_nesting_that_no_engine_can_be_sent() -> None:
    value: Any = 1
    for _ in range(2000):
        value = [value]
    with pytest.raises(BadRequestError, match="extra: nested too deeply"):
        chat(extra=value).check_text()


def test_half_a_character_in_the_name_of_a_field() -> None:
    request = chat()
    request.__pydantic_extra__ = {"\ud800": 1}
    with pytest.raises(BadRequestError):
        request.check_text()


@pytest.mark.parametrize(
    "fields", [{"prompt": [None] * 50_000}, {"prompt": [1] * 50_000 + ["a"]}, {"stop": [1] * 50_000}]
)
def test_a_list_is_looked_at_to_its_first_mistake(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as wrong:
        completion(**fields)
    assert wrong.value.error_count() <= 4


def test_many_mistakes_are_counted_and_not_listed() -> None:
    with pytest.raises(ValidationError, match="5000 mistakes in this body") as wrong:
        completion(logit_bias={str(number): "x" for number in range(5000)})
    assert wrong.value.error_count() == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"use_beam_search": True},
        {"prompt_logprobs": 0},
        {"cache_salt": "a/c"},
        {"vllm_xargs": {"kv_cache_report_mode": "full"}},
        {"return_token_offsets": True},
        {"routed_experts_prompt_start": 3},
        {"kv_transfer_params": {"do_remote_prefill": True}},
        {"logprob_token_ids": [5]},
        {"suffix": "x"},
        {"echo": True},
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"guided_json": {"type": "object"}},
        {"guided_choice": ["a"]},
        {"web_search_options": {}},
        {"spaces_between_special_tokens": False, "skip_special_tokens": False},
        {"stream_options": {"include_usage": True}},
        {"continue_final_message": True},
        {"chat_template_kwargs": {"tokenize": True}},
    ],
)
def test_options_without_effect_are_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError) as wrong:
        chat(**fields).check_options()
    assert wrong.value.param == next(iter(fields))
    assert str(wrong.value).startswith(next(iter(fields))) or "special tokens" in str(wrong.value)


def test_options_that_ask_for_nothing_are_taken() -> None:
    fields: dict[str, Any] = {
        "use_beam_search": False,
        "parallel_tool_calls": True,
        "function_call": "none",
        "modalities": ["text"],
        "functions": [],
        "kv_transfer_params": {},
        "user": "me",
        "session_id": "s",
        "length_penalty": 2.0,
        "spaces_between_special_tokens": False,
        "store": True,
        "metadata": {"a": "b"},
        "stream_options": {},
    }
    chat(**fields).check_options()
    chat(stream=True, stream_options={"include_usage": True}).check_options()
    chat(continue_final_message=True, add_generation_prompt=False).check_options()


def test_variables_of_the_template() -> None:
    assert chat().template_variables() == {"add_generation_prompt": True, "continue_final_message": False}
    made = chat(reasoning_effort="low", chat_template_kwargs={"a": None}, documents=[{"title": "t"}])
    assert made.template_variables() == {
        "a": None,
        "enable_thinking": True,
        "reasoning_effort": "low",
        "documents": [{"title": "t"}],
        "add_generation_prompt": True,
        "continue_final_message": False,
    }
    assert chat(reasoning_effort="none").template_variables()["enable_thinking"] is False
    thinking = {"enable_thinking": True, "add_generation_prompt": False}
    variables = chat(reasoning_effort="none", chat_template_kwargs=thinking).template_variables()
    assert (variables["enable_thinking"], variables["add_generation_prompt"]) == (True, True)


@pytest.mark.parametrize(("minimum", "looked_for"), [(0, True), (5, True), (6, False)])
def test_a_prefill_below_the_minimum_looks_for_no_repetition(minimum: int, looked_for: bool) -> None:
    """After the four tokens so far it generates one more, and vLLM looks for repetitions from the minimum on."""
    detection = {"max_pattern_size": 1, "min_count": 3}
    sampling = Sampling({"repetition_detection": detection}, maximum_tokens=20, minimum_tokens=minimum)
    asked = sampling.prefill_request("key", [1, 2], [9, 9, 9, 9])["sampling_params"]
    assert ("repetition_detection" in asked) == looked_for
