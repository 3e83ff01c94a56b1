"""`/v1/messages`, asked by Anthropic's own client and by hand."""

import asyncio
import json
from typing import Any

import pytest

from tests.gateway.fakes import FakeInstance
from tests.gateway.http.service import MODEL, Service

anthropic = pytest.importorskip("anthropic")
HI = [{"role": "user", "content": "Hi"}]


def client(service: Service) -> Any:
    return anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{service.port}", api_key="none", max_retries=0)


async def ask(service: Service, path: str = "/v1/messages", **fields: Any) -> Any:
    body = json.dumps({"messages": HI, "max_tokens": 20} | fields)
    return await service.client.post(path, content=body, headers={"Content-Type": "application/json"})


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of which is named by its type."""
    *blocks, end = text.split("\n\n")
    assert end == ""
    found = []
    for block in blocks:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def refusal(reply: Any, status: int) -> dict[str, Any]:
    """The error of a reply, which must have Anthropic's form."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert set(body) == {"type", "error"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    return dict(body["error"])


async def test_the_stock_client_whole_and_streamed(shared: Service) -> None:
    stock = client(shared)
    whole = await stock.messages.create(model=MODEL, messages=HI, max_tokens=20, system="Be brief.")
    assert (whole.model, whole.role, whole.stop_reason) == (MODEL, "assistant", "max_tokens")
    assert whole.usage.output_tokens == 20
    async with stock.messages.stream(model=MODEL, messages=HI, max_tokens=20, system="Be brief.") as stream:
        text = "".join([part async for part in stream.text_stream])
        final = await stream.get_final_message()
    assert text == whole.content[0].text
    assert final.content[0].text == text
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 20)
    assert final.usage.input_tokens == whole.usage.input_tokens
    counted = await stock.messages.count_tokens(model=MODEL, messages=HI, system="Be brief.")
    assert counted.input_tokens == whole.usage.input_tokens


async def test_the_stock_client_without_asyncio(shared: Service) -> None:
    def both() -> tuple[str, str]:
        stock = anthropic.Anthropic(base_url=f"http://127.0.0.1:{shared.port}", api_key="none", max_retries=0)
        whole = stock.messages.create(model=MODEL, messages=HI, max_tokens=20)
        with stock.messages.stream(model=MODEL, messages=HI, max_tokens=20) as stream:
            return whole.content[0].text, "".join(stream.text_stream)

    whole, streamed = await asyncio.to_thread(both)
    assert whole == streamed


async def test_the_events_of_a_stream(shared: Service) -> None:
    found = events((await ask(shared, stream=True)).text)
    kinds = [event["type"] for event in found]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert found[0]["message"]["content"] == []
    assert found[0]["message"]["usage"]["output_tokens"] == 0
    assert found[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] == 20


async def test_why_an_output_ended(service: Service, fakes: list[FakeInstance]) -> None:
    text = (await ask(service)).json()["content"][0]["text"]
    stopped = (await ask(service, stop_sequences=[text[4:6]])).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", text[4:6])
    assert stopped["content"][0]["text"] == text[: text.index(text[4:6])]
    for fake in fakes:
        fake.eos_at = 10
    assert (await ask(service)).json()["stop_reason"] == "end_turn"


async def test_the_id_of_the_request_is_where_the_stock_client_reads_it(shared: Service) -> None:
    raw = await client(shared).messages.with_raw_response.create(
        model=MODEL, messages=HI, max_tokens=2, extra_headers={"x-request-id": "mine"}
    )
    assert ((await raw.parse()).id, raw.request_id) == ("msg_mine", "mine")


async def test_errors_have_the_form_of_the_api(shared: Service) -> None:
    with pytest.raises(anthropic.NotFoundError, match="The model `other` does not exist"):
        await client(shared).messages.create(model="other", messages=HI, max_tokens=2)
    assert refusal(await ask(shared, model="other"), 404)["type"] == "not_found_error"
    assert refusal(await ask(shared, max_tokens="many"), 400)["type"] == "invalid_request_error"
    assert refusal(await shared.client.get("/v1/messages"), 405)["type"] == "invalid_request_error"
    batches = refusal(await shared.client.post("/v1/messages/batches", json={}), 404)
    assert "send the requests themselves" in batches["message"]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "stranger", "content": "Hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages.0.content.0.tool_use_id"),
        ({"system": [{"type": "image"}]}, "system.0"),
        ({"system": "\ud800"}, "system"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000_000}, "max_tokens"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"container": "x"}, "container"),
        ({"inference_geo": "us"}, "inference_geo"),
        ({"temperature": 9}, "temperature"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ],
)
async def test_what_is_not_offered_is_refused_by_name(shared: Service, fields: dict[str, Any], name: str) -> None:
    assert name in refusal(await ask(shared, **fields), 400)["message"]
