"""The HTTP service through a real server, over fake instances."""

import asyncio
import contextlib
import gzip
import json
import math
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer

from ares import __version__
from ares.config import GatewayConfig
from ares.gateway.http import app as application
from ares.gateway.http.responses import DirectSend
from ares.gateway.openai import rendering
from ares.gateway.openai.messages import FunctionDefinition, Message
from ares.gateway.openai.requests import ChatRequest, CompletionRequest
from ares.gateway.service import Gateway
from ares.gateway.session.phase import Phase
from tests.gateway.fakes import FakeInstance, eventually, expected, free_port, instances
from tests.gateway.running import VOCABULARY

MODEL = "some/model"
PROMPT = [10, 20, 30, 40, 50]


class _Server(uvicorn.Server):
    """Leaves the signals to pytest."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


class Service:
    """A running gateway and a client of it."""

    def __init__(self, gateway: Gateway, client: httpx.AsyncClient, fakes: list[FakeInstance], port: int) -> None:
        self.gateway = gateway
        self.client = client
        self.fakes = fakes
        self.port = port

    async def complete(self, **body: Any) -> httpx.Response:
        defaults = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "return_token_ids": True}
        return await self.client.post("/v1/completions", json=defaults | body)

    async def chat(self, **body: Any) -> httpx.Response:
        defaults = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20}
        return await self.client.post("/v1/chat/completions", json=defaults | body)

    async def quiet(self) -> None:
        for fake in self.fakes:
            await fake.until(lambda fake=fake: fake.quiet)


@contextlib.asynccontextmanager
async def serving(fakes: list[FakeInstance], folder: Path, **settings: Any) -> AsyncIterator[Service]:
    defaults: dict[str, Any] = {
        "model": MODEL,
        "preset": "off",
        "telemetry_interval_s": 0.02,
        "workers": [f.url for f in fakes],
    }
    app = application.build(GatewayConfig(**(defaults | settings)), folder)
    port = free_port()
    server = _Server(
        uvicorn.Config(
            DirectSend(app),
            host="127.0.0.1",
            port=port,
            http="httptools",
            log_config=None,
            timeout_graceful_shutdown=1,
        )
    )
    task = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
        yield Service(app.state.gateway, client, fakes, port)
    server.should_exit = True
    await asyncio.wait_for(task, 5)


@pytest.fixture
async def service(fakes: list[FakeInstance], model_folder: Path, impatient: None) -> AsyncIterator[Service]:
    async with serving(fakes, model_folder) as made:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in made.gateway.pool.instances), 15)
        yield made


@pytest.fixture(scope="module")
async def shared(model_folder: Path) -> AsyncIterator[Service]:
    """One service for all tests that leave its instances as they are."""
    async with (
        instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes,
        serving(fakes, model_folder) as made,
    ):
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in made.gateway.pool.instances), 15)
        yield made


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end as OpenAI's do."""
    *lines, last, end = text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def failure(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a reply, which must have OpenAI's form."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return dict(body["error"])


def sample(service: Service, name: str, **labels: str) -> float:
    return service.gateway.metrics.registry.get_sample_value(name, labels) or 0.0


# --- completions ---


async def test_a_completion(service: Service, byte_tokenizer: Tokenizer) -> None:
    reply = await service.complete()
    assert reply.status_code == 200
    body = reply.json()
    choice = body["choices"][0]
    tokens = expected(PROMPT, 20, vocabulary=VOCABULARY)
    assert choice["token_ids"] == tokens
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25}
    assert (body["object"], body["model"], choice["finish_reason"]) == ("text_completion", MODEL, "length")
    assert choice["text"] in byte_tokenizer.decode(PROMPT + tokens)
    assert sample(service, "ares_requests_total", route="completions", outcome="completed") == 1
    assert sample(service, "ares_output_tokens_total") == 20
    assert sample(service, "ares_prompt_tokens_total") == 5


async def test_a_streamed_completion_equals_the_whole(shared: Service) -> None:
    whole = (await shared.complete()).json()
    reply = await shared.complete(stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(reply.text)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [i for choice in choices for i in choice["token_ids"]] == whole["choices"][0]["token_ids"]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_a_streamed_chat_equals_the_whole(shared: Service) -> None:
    whole = (await shared.chat()).json()
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"]["role"] == "assistant"
    chunks = events((await shared.chat(stream=True)).text)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    content = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert content == whole["choices"][0]["message"]["content"]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert not any("usage" in chunk for chunk in chunks)


async def test_several_prompts_and_choices(shared: Service) -> None:
    prompts = [[10, 20, 30], [11, 21, 31, 41]]
    body = (await shared.complete(prompt=prompts, n=2, max_tokens=7)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    wanted = [expected(prompt, 7, vocabulary=VOCABULARY) for prompt in prompts for _ in range(2)]
    assert [choice["token_ids"] for choice in body["choices"]] == wanted
    # A prompt counts once, however many choices it has.
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 28, "total_tokens": 35}
    chunks = events((await shared.complete(prompt=prompts, n=2, max_tokens=7, stream=True)).text)
    for index, tokens in enumerate(wanted):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [i for choice in mine for i in choice["token_ids"]] == tokens
        assert mine[-1]["finish_reason"] == "length"


async def test_each_choice_has_a_seed_of_its_own(service: Service) -> None:
    await service.complete(n=3, seed=5)
    bodies = [body for fake in service.fakes[1:] for body in fake.asked]
    assert sorted(body["sampling_params"]["seed"] for body in bodies) == [5, 6, 7]


async def test_one_failed_choice_ends_the_others(service: Service) -> None:
    service.fakes[2].faults.refuse = 400
    error = failure(await service.complete(n=4, max_tokens=2000), 400)
    assert "decode-1 refuses" in error["message"]
    await service.quiet()


async def test_a_stop_string(service: Service, byte_tokenizer: Tokenizer) -> None:
    text = (await service.complete(max_tokens=60)).json()["choices"][0]["text"]
    pairs = [text[n : n + 2] for n in range(40)]
    stop = next(pair for n, pair in enumerate(pairs) if n > 9 and pairs.index(pair) == n and "\ufffd" not in pair)
    whole = (await service.complete(max_tokens=2000, stop=[stop])).json()
    choice = whole["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert len(choice["token_ids"]) == whole["usage"]["completion_tokens"] < 60
    reply = await service.complete(max_tokens=2000, stop=[stop], stream=True, stream_options={"include_usage": True})
    *chunks, last = events(reply.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    assert [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]] == choice["token_ids"]
    assert last["usage"] == whole["usage"]
    await service.quiet()


async def test_the_echo_of_a_prompt(shared: Service) -> None:
    body = (await shared.complete(prompt="Hello", echo=True)).json()
    assert body["choices"][0]["text"].startswith("Hello")
    chunks = events((await shared.complete(prompt="Hello", echo=True, stream=True)).text)
    assert chunks[0]["choices"][0]["text"] == "Hello"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == body["choices"][0]["text"]


async def test_chat_templates_and_tools(service: Service) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    await service.chat(messages=[{"role": "user", "content": "é"}], tools=tools)
    shown = service.gateway.text.decode(service.fakes[0].asked[-1]["token_ids"])
    assert shown == "<s>é</s>[1 tools]<s>"
    await service.chat(tools=tools, tool_choice="none", add_generation_prompt=False)
    assert service.gateway.text.decode(service.fakes[0].asked[-1]["token_ids"]) == "<s>Hi</s>"


async def test_the_models_sampling_defaults_apply(service: Service) -> None:
    await service.complete(temperature=0.25)
    asked = service.fakes[0].asked[-1]["sampling_params"]
    assert (asked["top_p"], asked["temperature"]) == (0.9, 0.25)
    await service.complete(top_p=0.5)
    assert service.fakes[0].asked[-1]["sampling_params"]["top_p"] == 0.5


async def rendered(service: Service, **body: Any) -> str:
    """The prompt of a chat."""
    before = [len(fake.asked) for fake in service.fakes]
    reply = await service.chat(max_tokens=2, **body)
    assert reply.status_code == 200, reply.text
    fake, start = next((f, n) for f, n in zip(service.fakes, before, strict=True) if len(f.asked) > n)
    return service.gateway.text.decode(fake.asked[start]["token_ids"])


def _called(call: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [call]}


def _parts(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*parts]}


async def test_messages_of_stock_clients(shared: Service) -> None:
    text = {"type": "text", "text": "Is it"}
    assert (
        await rendered(shared, messages=[_parts(text, {"type": "text", "text": "cold?"})]) == "<s>Is it\ncold?</s><s>"
    )
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for content in ({}, {"content": None}, {"content": ""}):
        turns = [_parts(text), _called(call) | content, {"role": "tool", "tool_call_id": "c", "content": [text]}]
        assert await rendered(shared, messages=turns) == "<s>Is it</s><s></s><s>Is it</s><s>"
    turns = [{"role": "developer", "content": "Be brief."}, _parts(text)]
    assert await rendered(shared, messages=turns) == "<s>Be brief.</s><s>Is it</s><s>"
    turns = [_parts(text), {"role": "assistant", "content": "No, it"}]
    continued = {"add_generation_prompt": False, "continue_final_message": True}
    assert await rendered(shared, messages=turns, **continued) == "<s>Is it</s><s>No, it"


_NULLABLE = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "user", "cache_salt"} - {"messages"})


async def test_null_is_absent(shared: Service) -> None:
    nulls = dict.fromkeys(_NULLABLE) | {"max_tokens": 2}
    for stream in ({}, {"stream": True, "stream_options": {"include_usage": None, "continuous_usage_stats": None}}):
        message = dict.fromkeys(Message.model_fields) | {"role": "user", "content": "Hi"}
        tool = {"type": None, "function": dict.fromkeys(FunctionDefinition.model_fields) | {"name": "f"}}
        reply = await shared.chat(**nulls | {"messages": [message], "tools": [tool]} | stream)
        assert reply.status_code == 200, reply.text
        reply = await shared.complete(**nulls | {"prompt": "Hi"} | stream)
        assert reply.status_code == 200, reply.text
    assert (await shared.complete(max_tokens=None)).json()["usage"]["completion_tokens"] == 16


async def test_usage_in_every_chunk(shared: Service) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for ask in (shared.chat, shared.complete):
        *chunks, last = events((await ask(stream=True, stream_options=options, n=2)).text)
        counts = [[c["usage"]["completion_tokens"] for c in chunks if c["choices"][0]["index"] == n] for n in (0, 1)]
        assert all(found == sorted(found) and found[-1] == 20 for found in counts)
        assert {chunk["usage"]["prompt_tokens"] for chunk in [*chunks, last]} == {last["usage"]["prompt_tokens"]}
        assert last["usage"]["completion_tokens"] == 40
    *chunks, last = events((await shared.complete(stream=True, stream_options=options | {"include_usage": False})).text)
    assert not any("usage" in chunk for chunk in [*chunks, last])


async def test_a_request_names_itself_in_its_body_too(shared: Service) -> None:
    assert (await shared.complete(request_id="mine")).headers["x-request-id"] == "mine"


# --- refusals ---


@pytest.mark.parametrize("content", [b"{", b"", b"[1, 2", b"\xff\xfe", b"nonsense"])
async def test_a_body_that_is_not_json(shared: Service, content: bytes) -> None:
    reply = await shared.client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert failure(reply, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("completions", {"max_tokens": "many"}, "max_tokens"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"temperature": 3}, "temperature"),
        ("completions", {"n": 0}, "n"),
        ("completions", {"n": 129}, "n"),
        ("completions", {"stream": "yes"}, "stream"),
        ("completions", {"prompt": {"text": "x"}}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt"),
        ("completions", {"prompt": [5, -1]}, "prompt"),
        ("completions", {"prompt": [5, 10**6]}, "prompt"),
        ("completions", {"prompt": [1, 2, "x"]}, "prompt"),
        ("completions", {"stop": ""}, "stop"),
        ("completions", {"stop": [1]}, "stop"),
        ("completions", {"suffix": "x"}, "suffix"),
        ("completions", {"best_of": 2}, "best_of"),
        ("completions", {"echo": True, "logprobs": 1}, "echo"),
        ("completions", {"stream_options": {"include_usage": "x"}}, "stream_options.include_usage"),
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("completions", {"prompt": None}, "prompt"),
        ("completions", {"prompt": "\ud800"}, "prompt"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": "hello"}, "messages"),
        ("chat/completions", {"messages": [{"role": "nobody", "content": "x"}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ("chat/completions", {"messages": [{"content": "x"}]}, "messages.0.role"),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ("chat/completions", {"messages": [_parts({"type": "text", "text": 5})]}, "messages.0.content.0.text"),
        ("chat/completions", {"messages": [_parts("a", {"type": "image_url"})]}, "messages.0.content.1"),
        ("chat/completions", {"messages": [_called("x")]}, "messages.0.tool_calls.0"),
        ("chat/completions", {"messages": [_called({"type": "custom"})]}, "messages.0.tool_calls.0.type"),
        ("chat/completions", {"messages": [_called({})]}, "messages.0.tool_calls.0.function"),
        ("chat/completions", {"messages": [_called({"function": {}})]}, "messages.0.tool_calls.0.function.name"),
        ("chat/completions", {"tools": [{"type": "function"}]}, "tools.0.function"),
        ("chat/completions", {"tools": [{"function": {"parameters": {}}}]}, "tools.0.function.name"),
        ("chat/completions", {"reasoning_effort": "some"}, "reasoning_effort"),
        ("chat/completions", {"continue_final_message": True}, "continue_final_message"),
        ("chat/completions", {"chat_template": "{{ messages }}"}, "chat_template"),
        ("chat/completions", {"top_logprobs": 3}, "top_logprobs"),
        ("chat/completions", {"logit_bias": {"a": 1}}, "logit_bias"),
        ("completions", {"stop_token_ids": [5, -1]}, "stop_token_ids.1"),
        ("chat/completions", {"allowed_token_ids": [1 << 40]}, "allowed_token_ids.0"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {"response_format": {"type": "xml"}}, "response_format"),
    ],
)
async def test_wrong_fields_are_named(shared: Service, route: str, body: dict[str, Any], param: str) -> None:
    before = sum(len(fake.asked) for fake in shared.fakes)
    base: dict[str, Any] = {"model": MODEL}
    base |= {"prompt": PROMPT} if route == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    content = json.dumps(base | body)
    reply = await shared.client.post(f"/v1/{route}", content=content, headers={"Content-Type": "application/json"})
    error = failure(reply, 400)
    assert error["param"] == param
    assert sum(len(fake.asked) for fake in shared.fakes) == before


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "Content-Type: application/json"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "application/x-www-form-urlencoded"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "gzip"),
    ],
)
async def test_a_body_that_is_not_read(shared: Service, headers: dict[str, str], said: str) -> None:
    content = b'{"prompt": "hi", "max_tokens": 1}'
    content = gzip.compress(content) if "gzip" in headers.values() else content
    reply = await shared.client.post("/v1/completions", content=content, headers=headers)
    assert said in failure(reply, 415)["message"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "must be a JSON object; it is empty"),
        (b"null", "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b'"hello"', "must be a JSON object"),
        (b"{", "is not JSON: "),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5_000 + b"}", "numbers is too long"),
    ],
)
async def test_a_body_that_is_no_object_of_json(shared: Service, content: bytes, said: str) -> None:
    headers = {"Content-Type": "application/json"}
    reply = await shared.client.post("/v1/completions", content=content, headers=headers)
    assert said in failure(reply, 400)["message"]


@pytest.mark.parametrize(
    ("route", "fields", "said"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": {"type": "text"}}]}, "a list of parts"),
        ("chat/completions", {"messages": [_called({"function": {"name": "f", "arguments": [1]}})]}, "JSON as text"),
        ("completions", {"prompt": [1.5]}, "token ids"),
        ("completions", {"prompt": "x", "stop": {}}, "a list of texts"),
    ],
)
async def test_a_field_of_several_types_says_all_of_them(
    shared: Service, route: str, fields: dict[str, Any], said: str
) -> None:
    reply = await shared.client.post(f"/v1/{route}", json={"model": MODEL} | fields)
    assert said in failure(reply, 400)["message"]


@pytest.mark.parametrize("fault", [ImportError("no jinja2"), TemplateSyntaxError("unexpected end", 1), OSError("no")])
async def test_a_fault_of_the_gateways_own_is_not_the_clients(
    shared: Service, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise fault

    monkeypatch.setattr(rendering, "render", fail)
    assert failure(await shared.chat(), 500)["type"] == "server_error"
    monkeypatch.setattr(shared.gateway.text, "_chat_template", None)
    assert "/v1/completions" in failure(await shared.chat(), 400)["message"]


@pytest.mark.parametrize("value", [{"choice": ["\ud800"]}, {"\ud800": 1}])
@pytest.mark.parametrize("stream", [True, False])
async def test_what_no_engine_can_be_sent_is_refused_before_it_starts(
    shared: Service, stream: bool, value: dict[str, Any]
) -> None:
    before = sum(len(fake.asked) for fake in shared.fakes)
    content = json.dumps({"model": MODEL, "prompt": PROMPT, "stream": stream, "structured_outputs": value})
    headers = {"Content-Type": "application/json"}
    reply = await shared.client.post("/v1/completions", content=content, headers=headers)
    assert failure(reply, 400)["param"] == "structured_outputs"
    assert sum(len(fake.asked) for fake in shared.fakes) == before


async def test_an_unknown_model(shared: Service) -> None:
    error = failure(await shared.complete(model="other"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert (await shared.complete(model=None)).status_code == 200


async def test_the_model_is_served_under_the_names_that_it_is_given(
    fakes: list[FakeInstance], model_folder: Path, impatient: None
) -> None:
    fakes[1].models, fakes[2].models = ["tiny"], [MODEL]  # by either an instance is known as ours
    async with serving(fakes, model_folder, served_model_name=["tiny", "small"]) as service:
        await eventually(lambda: all(i.open for i in service.gateway.pool.instances), 15)
        listed = (await service.client.get("/v1/models")).json()["data"]
        assert [entry["id"] for entry in listed] == ["tiny", "small"]
        for name in ("tiny", "small", None):
            assert (await service.complete(model=name)).json()["model"] == "tiny"
        assert failure(await service.complete(), 404)["code"] == "model_not_found"


async def test_a_prompt_beyond_the_context(shared: Service) -> None:
    error = failure(await shared.complete(prompt=[5] * 5000), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    error = failure(await shared.chat(messages=[{"role": "user", "content": "x" * 5000}]), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    error = failure(await shared.complete(max_tokens=4096), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")


async def test_more_sequences_than_may_wait(shared: Service) -> None:
    error = failure(await shared.complete(prompt=["a"] * 100, n=100), 400)
    assert error["param"] == "n"
    assert "10000 sequences; at most 2048" in error["message"]


_TOOL = {"type": "function", "function": {"name": "f", "description": "d" * 30_000}}


@pytest.mark.parametrize(
    ("body", "aside"),
    [
        ({"prompt": "a"}, False),
        ({"prompt": "a" * 30_000}, True),
        ({"prompt": ["a" * 100] * 300}, True),
        ({"messages": [{"role": "user", "content": "a"}]}, False),
        ({"messages": [{"role": "a" * 30_000, "content": "a"}]}, True),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [_TOOL]}, True),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"x": "a" * 30_000}}, True),
    ],
)
async def test_a_large_body_is_tokenised_aside(
    shared: Service, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], aside: bool
) -> None:
    text, threads = shared.gateway.text, set[int]()

    def noted(work: Any) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            threads.add(threading.get_ident())
            return work(*arguments, **settings)

        return call

    monkeypatch.setattr(text, "encode", noted(text.encode))
    monkeypatch.setattr(text, "render_chat", noted(text.render_chat))
    route = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    await shared.client.post(route, json=body | {"max_tokens": 1})
    assert [thread != threading.get_ident() for thread in threads] == [aside]


@pytest.mark.parametrize("loop", ["{% for i in range(99999) %}{% endfor %}" * 9, None])
async def test_a_client_brings_no_template(shared: Service, loop: str | None) -> None:
    error = failure(await shared.chat(chat_template_kwargs={"chat_template": loop}), 400)
    assert error["param"] == "chat_template_kwargs"


@pytest.mark.parametrize("host", ["[", "x:y:z", "a/b?c#d"])
async def test_an_unknown_route_of_no_host(shared: Service, host: str) -> None:
    error = failure(await shared.client.get("/v1/nothing", headers={"Host": host}), 404)
    assert error["message"] == "no such route: GET /v1/nothing"


async def test_a_command_with_half_a_character_in_a_name(shared: Service) -> None:
    headers = {"Content-Type": "application/json"}
    for body in (b'{"preset": "off", "\\ud800": 1}', b'{"preset": "\\ud800"}'):
        failure(await shared.client.put("/admin/v1/preset", content=body, headers=headers), 400)


async def test_the_openapi_document(shared: Service) -> None:
    paths = (await shared.client.get("/openapi.json")).json()["paths"]
    for path in ("/v1/chat/completions", "/v1/completions"):
        route = paths[path]["post"]
        assert {p["name"] for p in route["parameters"]} == {"x-request-id", "x-ares-class"}
        assert set(route["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        assert {"400", "404", "413", "429", "502", "503", "default"} < route["responses"].keys()
    assert all("422" not in route["responses"] for routes in paths.values() for route in routes.values())


async def test_unknown_routes_and_methods(shared: Service) -> None:
    error = failure(await shared.client.get("/v1/nothing"), 404)
    assert "GET /v1/nothing" in error["message"]
    wrong = await shared.client.get("/v1/completions")
    failure(wrong, 405)
    assert wrong.headers["allow"] == "POST"


async def test_a_body_that_is_declared_too_large(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder, max_body_bytes=1000) as service:
        reply = await service.client.post("/v1/completions", content=b" " * 1001)
        assert "1000 bytes" in failure(reply, 413)["message"]
        reply = await service.client.post("/v1/completions", content=b" " * 1000)
        assert reply.status_code != 413


async def test_a_body_that_turns_out_too_large(fakes: list[FakeInstance], model_folder: Path) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    async with serving(fakes, model_folder, max_body_bytes=1000) as service:
        reply = await service.client.post("/v1/completions", content=chunks())
        assert "1000 bytes" in failure(reply, 413)["message"]


async def test_an_undeclared_body_that_fits(shared: Service) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"prompt": [5, 6], '
        yield b'"max_tokens": 3}'

    reply = await shared.client.post("/v1/completions", content=chunks(), headers={"Content-Type": "application/json"})
    assert reply.status_code == 200


async def test_without_instances(model_folder: Path) -> None:
    absent = FakeInstance("absent", "both", {})
    async with serving([absent], model_folder) as service:
        failure(await service.client.get("/ready"), 503)
        assert (await service.client.get("/health")).json() == {"status": "ok"}
        reply = await service.complete()
        failure(reply, 503)
        assert reply.headers["retry-after"] == "1"
        failure(await service.complete(stream=True), 503)
        assert (await service.client.get("/v1/models")).json()["data"][0]["max_model_len"] is None
        assert (await service.client.get("/metrics")).status_code == 200


async def test_engines_that_fail(service: Service) -> None:
    for fake in service.fakes:
        fake.faults.refuse = 500
    assert failure(await service.complete(), 502)["type"] == "server_error"
    for fake in service.fakes:
        fake.faults.refuse = 422
    assert "refuses" in failure(await service.complete(), 422)["message"]
    chunks = events((await service.complete(stream=True)).text)
    assert chunks[-1]["error"]["message"] == "prefill-0 refuses"
    assert sample(service, "ares_requests_total", route="completions", outcome="failed") == 3


async def test_an_unexpected_failure_is_an_openai_error(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(service.gateway.controller, "_place", broken)
    error = failure(await service.complete(), 500)
    assert "a bug" not in error["message"]
    monkeypatch.undo()
    assert (await service.complete()).status_code == 200


# --- service classes, limits and presets ---


async def test_a_class_is_named_in_a_header_and_must_exist(fakes: list[FakeInstance], model_folder: Path) -> None:
    classes = {"batch": {"ttft_s": 60, "rank": 1, "gap_s": "none"}}
    async with serving(fakes, model_folder, classes=classes, slo_ttft_s=2.0) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        body = {"prompt": PROMPT, "max_tokens": 5, "priority": 3}
        reply = await service.client.post("/v1/completions", json=body, headers={"x-ares-class": "batch"})
        assert reply.status_code == 200
        batch, usual = service.gateway.objective("batch", 3), service.gateway.objective(None, 0)
        assert (batch.ttft_s, batch.tpot_s, batch.rank) == (60, None, 4)
        assert (usual.ttft_s, usual.rank) == (2.0, 0)
        assert (batch.gap_s, usual.gap_s) == (math.inf, 2.0)
        metrics = (await service.client.get("/metrics")).text
        assert 'ares_longest_gap_seconds_count{service_class="batch"} 1.0' in metrics
        reply = await service.client.post("/v1/completions", json=body, headers={"x-ares-class": "gold"})
        assert "no class 'gold'; configured: batch" in failure(reply, 400)["message"]


async def test_a_full_queue_is_refused_with_when_to_try_again(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder, maximum_waiting=2) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        fakes[0].faults.answer_after_s = 1.0
        waiting = [asyncio.create_task(service.complete()) for _ in range(2)]
        await eventually(lambda: len(service.gateway.backlog) == 2)
        reply = await service.complete()
        assert "2 requests wait already" in failure(reply, 503)["message"]
        assert reply.headers["retry-after"] == "1"
        assert [(await one).status_code for one in waiting] == [200, 200]
        fakes[0].faults.answer_after_s = 0.0
        assert (await service.complete()).status_code == 200


async def test_what_is_being_tokenised_fills_the_queue(
    fakes: list[FakeInstance], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(fakes, model_folder, maximum_waiting=2) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        text, go = service.gateway.text, threading.Event()
        encode = text.encode

        def late(given: str, *, special: bool = True) -> list[int]:
            go.wait(10)
            return encode(given, special=special)

        monkeypatch.setattr(text, "encode", late)
        # Both bodies are large; the first prompt has more tokens than the model takes.
        stop = ["b" * 30_000]
        coming = [asyncio.create_task(service.complete(prompt=p, stop=stop)) for p in ("a" * 30_000, "a")]
        await eventually(lambda: len(service.gateway.backlog) == 2)
        more = await asyncio.gather(*(service.complete(prompt="a", stop=stop) for _ in range(10)))
        assert {failure(reply, 503)["message"] for reply in more} == {"2 requests wait already"}
        go.set()
        assert [(await one).status_code for one in coming] == [400, 200]
        assert (len(service.gateway.backlog), service.gateway.backlog.tokens) == (0, 0)


@pytest.mark.parametrize(
    ("limit", "taken"), [({"maximum_waiting": 2}, 2), ({"maximum_waiting_tokens": 300}, 3)], ids=["number", "tokens"]
)
async def test_who_comes_at_once_does_not_slip_in(
    fakes: list[FakeInstance], model_folder: Path, limit: dict[str, int], taken: int
) -> None:
    fakes[0].faults.hang = True
    app = application.build(
        GatewayConfig(model=MODEL, preset="off", workers=[f.url for f in fakes], **limit),  # type: ignore[arg-type]
        model_folder,
    )
    gateway: Gateway = app.state.gateway
    async with app.router.lifespan_context(app):
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in gateway.pool.instances), 15)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            body = {"prompt": [10] * 100, "max_tokens": 1, "stream": True}
            # Turn by turn they do the same: all have asked before the first is noted.
            tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(20)]
            done, _ = await asyncio.wait(tasks, timeout=3)
            refused, waiting, begun = (
                [task.result().status_code for task in done],
                len(gateway.backlog),
                [*gateway.sessions],
            )
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert (refused, waiting, len(begun)) == ([503] * (20 - taken), taken, taken)
        assert (len(gateway.backlog), gateway.backlog.tokens) == (0, 0)


@pytest.mark.parametrize("preset", ["off", "ares-rebalance"])
async def test_who_waits_in_an_engine_fills_the_queue(
    fakes: list[FakeInstance], model_folder: Path, preset: str
) -> None:
    async with serving(fakes, model_folder, maximum_waiting=2, preset=preset) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        for fake in fakes[1:]:
            fake.faults.silent_stream = True
        waiting = [asyncio.create_task(service.complete()) for _ in range(2)]
        await eventually(lambda: [s.phase for s in service.gateway.sessions.values()] == [Phase.DECODE] * 2)
        assert "2 requests wait already" in failure(await service.complete(), 503)["message"]
        for fake in fakes[1:]:
            fake.faults.silent_stream = False
            fake.hold_at = 10
        # Now they have tokens: there is room in the queue.
        await eventually(lambda: len(service.gateway.backlog) == 0)
        more = asyncio.create_task(service.complete())
        await eventually(lambda: len(service.gateway.sessions) == 3)
        for fake in fakes[1:]:
            fake.hold_at = None
        assert [(await one).status_code for one in (*waiting, more)] == [200] * 3
        assert (len(service.gateway.backlog), service.gateway.backlog.tokens) == (0, 0)


async def test_a_queue_is_full_by_the_tokens_that_it_will_take_too(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    async with serving(fakes, model_folder, maximum_waiting_tokens=1000) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        fakes[0].faults.hang = True
        # 400 tokens each: 300 of the prompt, and a limit of 100 that lies below what outputs usually have.
        waiting = [asyncio.create_task(service.complete(prompt=[10] * 300, max_tokens=100)) for _ in range(3)]
        await eventually(lambda: len(service.gateway.backlog) == 3)
        assert service.gateway.backlog.tokens == 1200
        reply = await service.complete()
        assert "3 requests of 1200 tokens wait already" in failure(reply, 503)["message"]
        assert int(reply.headers["retry-after"]) >= 1
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await eventually(lambda: len(service.gateway.backlog) == 0)
        fakes[0].faults.hang = False
        assert (await service.complete()).status_code == 200
        assert service.gateway.backlog.tokens == 0


async def test_a_queue_is_as_long_as_the_memory_of_the_pool_is_large(shared: Service) -> None:
    held = sum(i.state.capacity_tokens for i in shared.gateway.pool.decode())
    assert held == 2 * 1000 * 16
    assert shared.gateway.maximum_waiting_tokens == 16 * held


async def test_the_preset_is_switched_while_serving(service: Service) -> None:
    reply = await service.client.put("/admin/v1/preset", json={"preset": "ares"})
    assert reply.json() == {"preset": "ares"}
    assert (await service.complete()).status_code == 200
    assert (await service.client.get("/admin/v1/status")).json()["preset"] == "ares"
    reply = await service.client.put("/admin/v1/preset", json={"preset": "ares-oracle"})
    assert "true lengths" in failure(reply, 400)["message"]
    assert failure(await service.client.put("/admin/v1/preset", json={}), 400)["param"] == "preset"


# --- request ids ---


async def test_request_ids(shared: Service) -> None:
    reply = await shared.client.post(
        "/v1/completions", json={"prompt": PROMPT, "max_tokens": 2}, headers={"x-request-id": "mine-1"}
    )
    assert reply.headers["x-request-id"] == "mine-1"
    assert reply.json()["id"] == "cmpl-mine-1"
    streamed = await shared.client.post(
        "/v1/completions", json={"prompt": PROMPT, "stream": True}, headers={"x-request-id": "mine-2"}
    )
    assert streamed.headers["x-request-id"] == "mine-2"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "tab\there", "ünicode"])
async def test_malformed_request_ids_are_replaced(shared: Service, given: str) -> None:
    reply = await shared.client.post(
        "/v1/completions",
        json={"prompt": PROMPT, "max_tokens": 2},
        headers={"x-request-id": given.encode("latin-1")},  # type: ignore[dict-item]
    )
    assert reply.status_code == 200
    made = reply.headers["x-request-id"]
    assert made != given
    assert len(made) == 32


# --- clients that leave ---


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_the_generation(service: Service, stream: bool) -> None:
    task = asyncio.create_task(service.complete(max_tokens=4000, stream=stream))
    await eventually(lambda: any(s.emitted for s in service.gateway.sessions.values()))
    await eventually(lambda: any(fake.running for fake in service.fakes[1:]))
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await service.quiet()
    await eventually(lambda: not service.gateway.sessions)
    assert sum(len(fake.aborted) for fake in service.fakes) == 1
    await eventually(lambda: sample(service, "ares_requests_total", route="completions", outcome="cancelled") == 1)


async def test_what_cannot_be_resumed_ends_with_an_error_in_its_stream(service: Service) -> None:
    for fake in service.fakes[1:]:
        fake.hold_at = 30
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 300, "seed": 1, "stream": True}
    async with service.client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        events = (line.removeprefix("data: ") async for line in reply.aiter_lines() if line)
        assert "choices" in json.loads(await anext(events))
        await next(fake for fake in service.fakes[1:] if fake.running).die()
        *_, last, end = [event async for event in events]
    failure = json.loads(last)["error"]
    assert "seed cannot be resumed exactly" in failure["message"]
    assert (failure["type"], end) == ("server_error", "[DONE]")


async def test_a_client_that_leaves_with_several_choices(service: Service) -> None:
    task = asyncio.create_task(service.complete(max_tokens=4000, n=4))
    await eventually(lambda: sum(len(fake.running) for fake in service.fakes[1:]) == 4)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await service.quiet()
    await eventually(lambda: not service.gateway.sessions)


# --- the operator's routes ---


async def running(service: Service, maximum: int = 400) -> "asyncio.Task[httpx.Response]":
    task = asyncio.create_task(
        service.client.post(
            "/v1/completions",
            json={"prompt": PROMPT, "max_tokens": maximum, "return_token_ids": True},
            headers={"x-request-id": "mine"},
        )
    )
    await eventually(lambda: "mine" in service.gateway.sessions)
    await eventually(lambda: service.gateway.sessions["mine"].not_movable() is None)
    return task


async def test_status_and_a_commanded_move(service: Service) -> None:
    task = await running(service)
    status = (await service.client.get("/admin/v1/status")).json()
    assert [row["name"] for row in status["instances"]] == ["prefill-0", "decode-0", "decode-1"]
    assert all(row["healthy"] for row in status["instances"])
    assert status["process"]["tasks"] > 5
    assert (status["waiting"], status["suspended"], status["backlog"]) == (0, 0, 0)
    assert set(status["connectors"]) == {"prefill-0", "decode-0", "decode-1"}
    row = status["requests"][0]
    assert (row["id"], row["movable"], row["moves"]) == ("mine", True, 0)
    target = "decode-1" if row["instance"] == "decode-0" else "decode-0"
    moved = await service.client.post("/admin/v1/migrations", json={"request_id": "mine", "target": target})
    assert moved.status_code == 200
    assert moved.json()["outcome"] == "moved"
    assert (moved.json()["source"], moved.json()["target"]) == (row["instance"], target)
    status = (await service.client.get("/admin/v1/status")).json()
    assert status["requests"][0]["instance"] == target
    assert [record["outcome"] for record in status["migrations"]] == ["moved"]
    reply = (await task).json()
    assert reply["choices"][0]["token_ids"] == expected(PROMPT, 400, vocabulary=VOCABULARY)
    assert reply["usage"]["completion_tokens"] == 400


async def test_a_move_by_the_id_that_the_client_got(service: Service) -> None:
    @contextlib.asynccontextmanager
    async def streaming(choices: int) -> AsyncIterator[str]:
        """A stream without a name of the client's; gives the id in its reply."""
        body = {"prompt": PROMPT, "max_tokens": 800, "stream": True, "n": choices}
        async with service.client.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.aiter_lines()  # the stream ends with its reader
            yield json.loads((await anext(lines)).removeprefix("data: "))["id"]

    async with streaming(1) as given:
        own = given.removeprefix("cmpl-")
        await eventually(lambda: own in service.gateway.sessions)
        await eventually(lambda: service.gateway.sessions[own].not_movable() is None)
        here = service.gateway.sessions[own].instance
        target = next(name for name in ("decode-0", "decode-1") if here is not None and name != here.name)
        body = {"request_id": given, "target": f"{target[:6]}..{target[-1]}"}
        reply = await service.client.post("/admin/v1/migrations", json=body)
        assert (reply.status_code, reply.json()["request_id"], reply.json()["target"]) == (200, own, target)
    async with streaming(2) as given:
        await eventually(lambda: len(service.gateway.sessions) == 2)
        body = {"request_id": given, "target": "decode-0"}
        error = failure(await service.client.post("/admin/v1/migrations", json=body), 409)
        assert error["code"] == "request_ambiguous"
        assert "{0}-0, {0}-1".format(given.removeprefix("cmpl-")) in error["message"]
    error = failure(await service.client.post("/admin/v1/instances/decode../drain"), 409)
    assert error["code"] == "instance_ambiguous"
    await service.quiet()


async def test_moves_that_cannot_be(service: Service) -> None:
    async def move(**body: Any) -> httpx.Response:
        return await service.client.post("/admin/v1/migrations", json=body)

    task = await running(service)
    here = service.gateway.sessions["mine"].instance
    assert here is not None
    error = failure(await move(request_id="other", target="decode-1"), 404)
    assert error["code"] == "request_not_found"
    error = failure(await move(request_id="mine", target="nowhere"), 404)
    assert error["code"] == "instance_not_found"
    assert "decode-0, decode-1" in error["message"]
    assert "already" in failure(await move(request_id="mine", target=here.name), 409)["message"]
    assert "does not decode" in failure(await move(request_id="mine", target="prefill-0"), 409)["message"]
    assert failure(await move(request_id="mine"), 400)["param"] == "target"
    assert failure(await move(request_id="mine", target="decode-1", force=True), 400)["param"] == "force"
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await service.quiet()


async def test_a_pinned_request_is_not_moved_on_command(service: Service) -> None:
    request = {"prompt": PROMPT, "max_tokens": 300, "seed": 1}
    task = asyncio.create_task(service.client.post("/v1/completions", json=request, headers={"x-request-id": "mine"}))
    await eventually(lambda: "mine" in service.gateway.sessions and service.gateway.sessions["mine"].emitted != [])
    for target in ("decode-0", "decode-1"):
        reply = await service.client.post("/admin/v1/migrations", json={"request_id": "mine", "target": target})
        failure(reply, 409)
    status = (await service.client.get("/admin/v1/status")).json()
    assert (status["requests"][0]["movable"], status["requests"][0]["reason"]) == (False, "seed")
    await task


async def test_the_admin_key(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder, admin_key="secret") as service:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secre"}):
            assert failure(await service.client.get("/admin/v1/status", headers=headers), 401)["type"]
            reply = await service.client.post("/admin/v1/migrations", json={}, headers=headers)
            assert reply.status_code in {400, 401}
        allowed = await service.client.get("/admin/v1/status", headers={"Authorization": "Bearer secret"})
        assert allowed.status_code == 200
        assert (await service.client.get("/health")).status_code == 200


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 200), ("::1", 200), ("10.0.0.1", 403), ("unix", 403)])
async def test_without_a_key_only_this_machine(
    fakes: list[FakeInstance], model_folder: Path, host: str, status: int
) -> None:
    app = application.build(GatewayConfig(model=MODEL, workers=[fakes[0].url]), model_folder)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, client=(host, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            assert (await client.get("/admin/v1/status")).status_code == status


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example", "Origin": "https://evil.example"},
        {"Host": "evil.example"},  # rebound to loopback
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "evil@127.0.0.1"},
        {"Host": "10.0.0.1:8000"},
        {"Host": ""},
        {"Host": "localhost:8000", "Origin": "https://evil.example"},
        {"Host": "localhost:8000", "Origin": "http://localhost:8000.evil.example"},
        {"Host": "localhost:8000", "Origin": "http://localhost:3000"},
        {"Host": "localhost:8000", "Origin": "null"},
        {"Host": "localhost:8000", "Sec-Fetch-Site": "cross-site"},
        {"Host": "localhost:8000", "Sec-Fetch-Site": "same-site"},
    ],
)
async def test_without_a_key_no_foreign_page_commands(shared: Service, headers: dict[str, str]) -> None:
    drain = await shared.client.post(
        "/admin/v1/instances/decode-0/drain", headers=headers | {"Content-Type": "text/plain"}
    )
    assert failure(drain, 403)["type"] == "permission_error"
    assert not any(i.state.draining for i in shared.gateway.pool.instances)
    for path in ("/admin/v1/status", "/admin/v1/events"):
        failure(await shared.client.get(path, headers=headers), 403)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", "[::1]"])
async def test_the_dashboards_own_page_needs_no_key(shared: Service, host: str) -> None:
    tells = {"Host": host, "Origin": f"http://{host.lower()}", "Sec-Fetch-Site": "same-origin"}
    for headers in (tells, tells | {"Sec-Fetch-Site": "none"}, {"Host": host}):
        assert (await shared.client.get("/admin/v1/status", headers=headers)).status_code == 200
        undrain = await shared.client.post("/admin/v1/instances/decode-0/undrain", headers=headers)
        assert undrain.status_code == 200


async def test_with_a_key_any_name_will_do(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder, admin_key="secret") as service:
        headers = {"Host": "ares.example", "Origin": "https://ares.example", "Authorization": "Bearer secret"}
        assert (await service.client.get("/admin/v1/status", headers=headers)).status_code == 200


# --- what an operator's tools read ---


async def test_models_version_and_readiness(shared: Service) -> None:
    models = (await shared.client.get("/v1/models")).json()
    assert [(m["id"], m["max_model_len"]) for m in models["data"]] == [(MODEL, 4096)]
    version = (await shared.client.get("/version")).json()
    assert version["ares"] == __version__
    assert set(version["instances"]) == {"prefill-0", "decode-0", "decode-1"}
    assert (await shared.client.get("/ready")).json() == {"status": "ready"}


async def test_metrics_names(shared: Service) -> None:
    await shared.complete()
    text = (await shared.client.get("/metrics")).text
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert {
        "ares_requests_total",
        "ares_active_requests",
        "ares_prompt_tokens_total",
        "ares_output_tokens_total",
        "ares_time_to_first_token_seconds",
        "ares_time_per_output_token_seconds",
        "ares_migrations_total",
        "ares_migration_stall_seconds",
        "ares_migration_pulled_tokens_total",
        "ares_unmovable_requests_total",
        "ares_rebalance_decisions_total",
        "ares_instance_up",
        "ares_instance_resident_tokens",
        "ares_instance_kv_usage_ratio",
        "ares_instance_step_time_seconds",
        "ares_instance_running_requests",
        "ares_instance_waiting_requests",
        "ares_instance_preemptions",
    } <= names
    assert 'ares_instance_up{instance="decode-0",role="decode"} 1.0' in text
