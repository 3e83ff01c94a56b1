"""Reasoning, text and calls of tools as the blocks of `/v1/responses` and `/v1/messages`."""

import json
from typing import Any

from ares.gateway.anthropic.reply import MessageWriter
from ares.gateway.openai.parsing import MessageDelta, ToolCallDelta
from ares.gateway.openai.responses.reply import ResponseWriter
from ares.gateway.openai.responses.requests import ResponsesRequest

USAGE = {"input_tokens": 1, "output_tokens": 2}
DELTAS = [
    MessageDelta(reasoning="Hm"),
    MessageDelta(reasoning="m"),
    MessageDelta(content="So: "),
    MessageDelta(tool_calls=[ToolCallDelta(0, "c0", "f", "")]),
    MessageDelta(tool_calls=[ToolCallDelta(0, arguments='{"a":')]),
    MessageDelta(content="\n"),
    MessageDelta(tool_calls=[ToolCallDelta(0, arguments="1}")]),
    MessageDelta(tool_calls=[ToolCallDelta(1, "c1", "g", "{}")]),
]


def kinds(events: bytes) -> list[str]:
    return [json.loads(block.partition(b"data: ")[2])["type"] for block in events.split(b"\n\n") if block]


def response(*deltas: MessageDelta, cut: bool = False) -> tuple[dict[str, Any], list[str]]:
    writer = ResponseWriter(ResponsesRequest(input="Hi"), "resp_1", "m", {}, 9)
    for delta in deltas:
        writer.add(delta)
    body = writer.complete(USAGE, cut=cut)
    return body, kinds(writer.take_events())


def message(*deltas: MessageDelta, reason: str = "tool_calls", stop: str | None = None) -> tuple[Any, list[str]]:
    writer = MessageWriter("msg_1", "m")
    for delta in deltas:
        writer.add(delta)
    body = writer.complete(reason, stop, USAGE)
    return body, kinds(writer.take_events())


def test_a_response_has_an_item_for_each_block() -> None:
    body, events = response(*DELTAS)
    reasoning, said, first, between, second = body["output"]
    assert (reasoning["type"], reasoning["content"]) == ("reasoning", [{"type": "reasoning_text", "text": "Hmm"}])
    assert said["content"][0]["text"] == "So: "
    assert (first["call_id"], first["name"], first["arguments"]) == ("c0", "f", '{"a":1}')
    assert between["content"][0]["text"] == "\n"
    assert (second["call_id"], second["arguments"], second["status"]) == ("c1", "{}", "completed")
    assert events[:6] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
    ]
    assert events[-5:] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_only_the_last_item_of_a_cut_response_is_incomplete() -> None:
    body, events = response(*DELTAS, cut=True)
    assert [item["status"] for item in body["output"]] == ["completed"] * 4 + ["incomplete"]
    assert events[-1] == "response.incomplete"


def test_a_message_has_a_block_for_each() -> None:
    body, events = message(*DELTAS)
    thinking, said, first, between, second = body["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "Hmm")
    assert thinking["signature"]
    assert (said, between) == ({"type": "text", "text": "So: "}, {"type": "text", "text": "\n"})
    assert first == {"type": "tool_use", "id": "c0", "name": "f", "input": {"a": 1}}
    assert second["input"] == {}
    assert body["stop_reason"] == "tool_use"
    assert events.count("content_block_start") == events.count("content_block_stop") == 5


def test_a_call_that_a_stop_string_cut_is_not_run() -> None:
    cut = MessageDelta(tool_calls=[ToolCallDelta(0, "c0", "f", '{"a":')])
    body, _ = message(cut, reason="stop", stop="STOP")
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "STOP")
    assert body["content"][0]["input"] == {"INVALID_JSON": '{"a":'}
    whole = MessageDelta(tool_calls=[ToolCallDelta(0, "c0", "f", "{}")])
    assert message(whole, reason="stop", stop="STOP")[0]["stop_reason"] == "tool_use"
    assert message(cut, reason="length")[0]["stop_reason"] == "max_tokens"


def test_an_empty_message_has_one_block() -> None:
    assert message(reason="stop")[0]["content"] == [{"type": "text", "text": ""}]
