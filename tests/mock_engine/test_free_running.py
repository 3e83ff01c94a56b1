"""The mock that computes nothing per token: as many events as asked for, at its pace, in the forms of vLLM."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ares.bench import sse
from ares.free_ports import free_ports
from ares.mock_engine.free_running import FreeRunningInstance
from ares.mock_engine.http import Connection
from ares.mock_engine.settings import Identity
from tests.mock_engine.cluster import PROMPT
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(60)
GENERATE = "/inference/v1/generate"
WORDS = ["<unknown>", "The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", *map(str, range(100))]


@pytest.fixture
async def instance() -> AsyncIterator[FreeRunningInstance]:
    port = free_ports("127.0.0.1", 2)
    identity = Identity("mock-decode", "decode", "127.0.0.1", port, port + 1)
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = FreeRunningInstance(identity, "some/model", tokenizer)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(made), "127.0.0.1", port)
    yield made
    server.close()
    for connection in list(made.connections):
        connection.transport.abort()
    made.close()


@pytest.fixture
async def http(instance: FreeRunningInstance) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{instance.identity.port}", timeout=30) as client:
        yield client


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def body(tokens: int, **more: Any) -> dict[str, Any]:
    return {"token_ids": PROMPT, "sampling_params": {"max_tokens": tokens}, **more}


@pytest.mark.parametrize("tokens", [1, 2, 500])
async def test_a_stream_has_one_event_a_token(http: httpx.AsyncClient, tokens: int) -> None:
    streamed = events((await http.post(GENERATE, json=body(tokens, stream=True))).text)
    choices = [event["choices"][0] for event in streamed]
    assert [len(choice["token_ids"]) for choice in choices] == [1] * tokens
    assert [choice["finish_reason"] for choice in choices] == [None] * (tokens - 1) + ["length"]
    whole = (await http.post(GENERATE, json=body(tokens))).json()["choices"][0]["token_ids"]
    assert [choice["token_ids"][0] for choice in choices] == whole


async def test_many_chat_streams_at_once(instance: FreeRunningInstance) -> None:
    asked = {"model": "some/model", "messages": [{"role": "user", "content": "What is gravity?"}], "max_tokens": 2000}
    request = sse.request_bytes("/v1/chat/completions", {**asked, "ignore_eos": True, "stream": True})
    replies = await sse.read_at_once([request] * 8, [instance.identity.port], 60)
    for reply in replies:
        events = [count for _, count in reply.events_of_reads()]
        assert reply.complete
        assert sum(events) == 2000 + 2  # one for the role and `[DONE]`
        assert len(events) < sum(events) / 5  # many events a read


async def test_a_paced_stream_has_a_token_an_interval(http: httpx.AsyncClient) -> None:
    assert (await http.post("/simulate/pace", json={"interval_s": 0.02})).status_code == 200
    began = time.monotonic()
    assert len(events((await http.post(GENERATE, json=body(11, stream=True))).text)) == 11
    assert 0.17 < time.monotonic() - began < 5


async def test_a_client_that_leaves_ends_its_stream(instance: FreeRunningInstance, http: httpx.AsyncClient) -> None:
    instance.interval_s = 0.01
    async with http.stream("POST", GENERATE, json=body(100_000, stream=True)) as reply:
        await anext(reply.aiter_bytes())
        assert instance.streams == 1
    await eventually(lambda: instance.streams == 0)


async def test_prefill_names_the_kv_to_pull(http: httpx.AsyncClient) -> None:
    asked = body(1, kv_transfer_params={"do_remote_decode": True})
    transfer = (await http.post(GENERATE, json=asked)).json()["kv_transfer_params"]
    assert transfer["do_remote_prefill"] is True
    decoding = await http.post(GENERATE, json=body(2, kv_transfer_params=transfer))
    assert len(decoding.json()["choices"][0]["token_ids"]) == 2
    chat = {"messages": [], "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
    assert (await http.post("/v1/chat/completions", json=chat)).json()["kv_transfer_params"]["do_remote_prefill"]


@pytest.mark.parametrize(
    ("path", "sent", "status"),
    [
        (GENERATE, {"token_ids": []}, 400),
        ("/v1/completions", {"max_tokens": -1}, 400),
        ("/v1/chat/completions", {"stream": "perhaps"}, 400),
        ("/simulate/pace", {"interval_s": -1}, 400),
        ("/nowhere", {}, 404),
    ],
)
async def test_bad_requests_are_refused(http: httpx.AsyncClient, path: str, sent: dict[str, Any], status: int) -> None:
    reply = await http.post(path, json=sent)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


async def test_it_names_itself_a_mock(http: httpx.AsyncClient) -> None:
    version = (await http.get("/version")).json()
    assert version["mock"] is True
    assert (await http.get("/ares/v1/instance")).json()["name"] == "mock-decode"
