"""`/v1/responses`, asked by OpenAI's own client and by hand."""

import asyncio
import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from tests.gateway.http.service import MODEL, Service, failure, sample
from tests.waiting import eventually


def client(service: Service) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{service.port}/v1", api_key="none", max_retries=0)


async def respond(service: Service, **body: Any) -> Any:
    return await service.client.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 20} | body)


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of which is named by its type."""
    *blocks, end = text.split("\n\n")
    assert end == ""
    found = []
    for block in blocks:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


async def test_the_stock_client_whole_and_streamed(shared: Service) -> None:
    stock = client(shared)
    whole = await stock.responses.create(model=MODEL, input="Hi", max_output_tokens=20, metadata={"a": "b"})
    assert (whole.status, whole.model, whole.metadata) == ("incomplete", MODEL, {"a": "b"})
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.output_text
    assert whole.usage is not None
    assert whole.usage.output_tokens == 20
    assert whole.usage.total_tokens == whole.usage.input_tokens + 20
    text, last = "", None
    async for event in await stock.responses.create(model=MODEL, input="Hi", max_output_tokens=20, stream=True):
        text += event.delta if event.type == "response.output_text.delta" else ""
        last = event
    assert text == whole.output_text
    assert last is not None
    assert last.type == "response.incomplete"
    assert last.response.output_text == text
    assert last.response.usage == whole.usage


async def test_the_helper_of_the_stock_client(shared: Service) -> None:
    async with client(shared).responses.stream(model=MODEL, input="Hi", max_output_tokens=20) as stream:
        kinds = [event.type async for event in stream]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]


async def test_the_stock_client_without_asyncio(shared: Service) -> None:
    def ask() -> tuple[str, str]:
        stock = openai.OpenAI(base_url=f"http://127.0.0.1:{shared.port}/v1", api_key="none", max_retries=0)
        asked: dict[str, Any] = {"model": MODEL, "input": "Hi", "max_output_tokens": 20}
        whole = stock.responses.create(**asked)
        streamed = stock.responses.create(**asked, stream=True)
        return whole.output_text, "".join(e.delta for e in streamed if e.type == "response.output_text.delta")

    whole, streamed = await asyncio.to_thread(ask)
    assert whole == streamed


async def test_the_events_of_a_stream(shared: Service) -> None:
    found = events((await respond(shared, stream=True)).text)
    kinds = [event["type"] for event in found]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    item = found[2]["item"]
    assert item == {"type": "message", "id": item["id"], "role": "assistant", "content": [], "status": "in_progress"}
    inside = found[3:-2]
    assert {(e["item_id"], e["output_index"], e["content_index"]) for e in inside} == {(item["id"], 0, 0)}
    text = "".join(event["delta"] for event in found[4:-4])
    assert found[-4]["text"] == found[-3]["part"]["text"] == text
    assert found[-2]["item"] == {**item, "content": [found[-3]["part"]], "status": "incomplete"}
    last = found[-1]["response"]
    assert last["output"] == [found[-2]["item"]]
    assert last["id"] == found[0]["response"]["id"]
    assert found[0]["response"]["status"] == "in_progress"


async def test_an_output_that_ends_by_itself_is_completed(service: Service) -> None:
    prompt = len(service.gateway.text.encode("<s>Hi</s><s>"))
    for fake in service.fakes:
        fake.eos_at = prompt + 6
    body = (await respond(service)).json()
    assert (body["status"], body["incomplete_details"]) == ("completed", None)
    assert body["output"][0]["status"] == "completed"
    assert body["completed_at"] >= body["created_at"]
    found = events((await respond(service, stream=True)).text)
    assert found[-1]["type"] == "response.completed"
    assert found[-1]["response"]["output"][0]["content"] == body["output"][0]["content"]


async def test_the_response_says_what_was_chosen(shared: Service) -> None:
    body = (await respond(shared, temperature=0.5, instructions="Be brief.", user="me", store=True)).json()
    Response.model_validate(body, strict=False)
    wanted = {
        "object": "response",
        "error": None,
        "temperature": 0.5,
        "top_p": 0.9,  # the model's own default
        "instructions": "Be brief.",
        "user": "me",
        "max_output_tokens": 20,
        "tool_choice": "none",
        "tools": [],
        "truncation": "disabled",
        "parallel_tool_calls": True,
    }
    assert {name: body[name] for name in wanted} == wanted


async def test_logprobs_are_included_where_they_are_asked_for(shared: Service) -> None:
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 5}
    part = (await respond(shared, **asked)).json()["output"][0]["content"][0]
    assert len(part["logprobs"]) == 5
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    found = events((await respond(shared, **asked, stream=True)).text)
    streamed = [entry for e in found if e["type"] == "response.output_text.delta" for entry in e["logprobs"]]
    assert streamed == part["logprobs"]
    assert next(e for e in found if e["type"] == "response.output_item.done")["item"]["content"] == [part]


async def test_a_failure_in_a_stream_is_its_last_event(service: Service) -> None:
    for fake in service.fakes[1:]:
        fake.hold_at = 60
    stream = await client(service).responses.create(
        model=MODEL, input="Hi", max_output_tokens=300, stream=True, extra_body={"seed": 1}
    )
    async for event in stream:
        if event.type == "response.output_text.delta":
            break
    await next(fake for fake in service.fakes[1:] if fake.running).die()
    last = [event async for event in stream][-1]
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert "seed cannot be resumed exactly" in last.response.error.message


async def test_a_client_that_leaves_ends_the_generation(service: Service) -> None:
    task = asyncio.create_task(respond(service, max_output_tokens=4000))
    await eventually(lambda: any(fake.running for fake in service.fakes[1:]))
    task.cancel()
    await service.quiet()
    await eventually(lambda: sample(service, "ares_requests_total", route="responses", outcome="cancelled") == 1)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/responses/resp_1"),
        ("DELETE", "/v1/responses/resp_1"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("GET", "/v1/responses/resp_1/input_items"),
    ],
)
async def test_no_response_is_kept(shared: Service, method: str, path: str) -> None:
    error = failure(await shared.client.request(method, path), 404)
    assert "send the whole conversation as input" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "hosted"}}, "tool_choice"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["everything"]}, "include.0"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"type": "computer_call"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input.0.encrypted_content"),
        ({"input": [{"role": "stranger", "content": "Hi"}]}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"metadata": {"a": "\ud800"}}, "metadata"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 100_000_000}, "max_output_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
        ({"stop": ""}, "stop"),
    ],
)
async def test_what_is_not_offered_is_refused_by_name(shared: Service, fields: dict[str, Any], param: str) -> None:
    body = json.dumps({"input": "Hi", "max_output_tokens": 20} | fields)
    reply = await shared.client.post("/v1/responses", content=body, headers={"Content-Type": "application/json"})
    error = failure(reply, 400)
    assert error["param"] == param
    assert param.partition(".")[0] in error["message"] or param == "input"
