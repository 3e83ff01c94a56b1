"""The fields of `/v1/responses`, of vLLM's model and of the official client, are honoured or refused by name."""

from typing import Any

import pytest
from openai.types.responses import response_create_params

from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.responses.requests import ResponsesRequest

# A value with an effect, where the field would be refused.
REFUSED: dict[str, Any] = {
    "access_programs": {"a": 1},
    "background": True,
    "background_options": {"a": 1},
    "context_management": [{"type": "compaction"}],
    "conversation": "conv",
    "ec_transfer_params": {"a": 1},
    "enable_response_messages": True,
    "image": {"a": 1},
    "kv_transfer_params": {"a": 1},
    "media_io_kwargs": {"a": {}},
    "mm_processor_kwargs": {"a": 1},
    "moderation": {"model": "m"},
    "previous_input_messages": [{}],
    "previous_response_id": "resp",
    "prompt": {"id": "p"},
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "service_tier": "flex",
    "stream_options": {"include_obfuscation": True},
    "truncation": "auto",
}
# Of the chat request: whether it takes them is its own tests' matter.
OF_CHAT = {"cache_salt", "watermarking"}
# They change nothing in either server (vLLM: `mm_*` on its render routes alone).
WITHOUT_EFFECT = {"session_id", "mm_payload", "return_mm_kwargs"}


def fields() -> set[str]:
    found = set(response_create_params.ResponseCreateParamsBase.__annotations__)
    try:
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest as OfVllm
    except ImportError:
        return found
    return found | set(OfVllm.model_fields)


def chat(**given: Any) -> Any:
    asked = ResponsesRequest.model_validate({"input": "Hi", **given}).chat_request()
    asked.check_options()
    return asked


def test_each_field_is_honoured_or_refused() -> None:
    unknown = fields() - ResponsesRequest.model_fields.keys() - REFUSED.keys() - OF_CHAT - WITHOUT_EFFECT
    assert unknown == set()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_offered_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadRequestError, match=name) as failure:
        chat(**{name: REFUSED[name]})
    assert failure.value.param == name
    chat(**{name: None})  # null is absent


def test_items_become_messages() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    body = ResponsesRequest.model_validate(
        {
            "instructions": "Be brief.",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "So:"}]},
                call,
                {**call, "call_id": "c2"},
                {"type": "function_call_output", "call_id": "c1", "output": "1"},
            ],
        }
    ).chat_body()
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": number, "type": "function", "function": function} for number in ("c1", "c2")]
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "reasoning": "Hm", "content": "So:", "tool_calls": calls},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
    ]


def test_a_message_that_is_not_complete_is_continued() -> None:
    item = {"type": "message", "role": "assistant", "status": "incomplete", "content": "Once"}
    assert chat(input=[{"role": "user", "content": "Hi"}, item]).continue_final_message
    assert not chat(input=[{"role": "user", "content": "Hi"}, {**item, "status": "completed"}]).continue_final_message


def test_options_are_those_of_a_chat() -> None:
    tool = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    asked = chat(
        tools=[tool],
        tool_choice={"type": "function", "name": "f"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        reasoning={"effort": "low"},
        max_output_tokens=7,
        parallel_tool_calls=False,
    )
    assert asked.tools[0].function.name == "f"
    assert asked.tools[0].function.parameters == {"type": "object"}
    assert asked.tool_choice.function.name == "f"
    assert asked.reasoning_effort == "low"
    assert asked.limit() == 7
    assert not asked.parallel_tool_calls
    assert asked.response_format is not None
