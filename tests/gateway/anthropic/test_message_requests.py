"""Requests of `/v1/messages` become those of a chat; all fields are honoured or refused by name."""

from typing import Any

import pytest

from ares.gateway.anthropic.requests import CountTokensRequest, MessagesChat, MessagesRequest
from ares.gateway.openai.body import BadRequestError

REFUSED: dict[str, Any] = {
    "billing_policy": {"a": 1},
    "compaction": {"a": 1},
    "container": "c",
    "context_management": {"edits": [{}]},
    "diagnostics": {"a": 1},
    "ec_transfer_params": {"a": 1},
    "fallback_credit_token": "t",
    "fallbacks": ["m"],
    "inference_geo": "us",
    "kv_transfer_params": {"a": 1},
    "mcp_servers": [{"url": "x"}],
    "service_tier": "priority",
    "speed": "fast",
    "thread": {"a": 1},
    "user_profile_id": "u",
    "workspace_id": "w",
}
OF_CHAT = {"cache_salt", "watermarking"}
WITHOUT_EFFECT = {"cache_control", "mm_payload", "return_mm_kwargs", "betas"}


def fields() -> set[str]:
    create = pytest.importorskip("anthropic.types.beta.message_create_params")
    found = set(create.MessageCreateParamsBase.__annotations__)
    try:
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    except ImportError:
        return found
    return found | set(AnthropicMessagesRequest.model_fields)


def body(*, system_first: bool = False, **given: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9000, **given}
    return MessagesRequest.model_validate(asked).chat_body(system_first=system_first, disabled_thinking="none")


def test_each_field_is_honoured_or_refused() -> None:
    assert fields() - MessagesRequest.model_fields.keys() - REFUSED.keys() - OF_CHAT - WITHOUT_EFFECT == set()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_offered_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadRequestError, match=name):
        MessagesChat.of(body(**{name: REFUSED[name]})).check_options()
    body(**{name: None})


def test_blocks_become_messages() -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "1"}]}
    made = body(
        system=[{"type": "text", "text": "x-anthropic-billing-header: a"}, {"type": "text", "text": "Be brief."}],
        messages=[
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "So:"},
                    {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
                ],
            },
            {"role": "user", "content": [{"type": "text", "text": "Go on."}, result]},
        ],
    )
    call = {"id": "t", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert made["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "reasoning": "Hm", "tool_calls": [call], "content": "So:"},
        {"role": "tool", "tool_call_id": "t", "content": "1"},
        {"role": "user", "content": "Go on."},
    ]


def test_later_system_messages_go_where_the_template_takes_them() -> None:
    given = [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Now"}, {"role": "user", "content": "Ho"}]
    roles = [message["role"] for message in body(system="A", messages=given)["messages"]]
    assert roles == ["system", "user", "system", "user"]
    joined = body(system="A", messages=given, system_first=True)["messages"]
    assert [message["role"] for message in joined] == ["system", "user", "user"]
    assert joined[0]["content"] == "ANow"


def test_tools_and_options() -> None:
    tool = {"name": "f", "input_schema": {"properties": {}}}
    made = body(
        tools=[tool],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        thinking={"type": "disabled"},
        stop_sequences=["x"],
        output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}},
    )
    assert made["tools"][0]["function"] == {"name": "f", "parameters": {"properties": {}, "type": "object"}}
    assert (made["tool_choice"], made["parallel_tool_calls"]) == ("required", False)
    assert (made["reasoning_effort"], made["stop"]) == ("none", ["x"])
    assert made["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert body(tools=[tool], tool_choice={"type": "tool", "name": "f"})["tool_choice"]["function"] == {"name": "f"}
    with pytest.raises(BadRequestError, match="no such tool"):
        body(tools=[tool], tool_choice={"type": "tool", "name": "g"})
    assert CountTokensRequest.model_fields.keys() <= MessagesRequest.model_fields.keys()
