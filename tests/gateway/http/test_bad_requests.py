"""Requests that are refused: each gets an error of OpenAI's form that says what is wrong."""

import gzip
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateSyntaxError

from ares.gateway.openai import rendering
from tests.gateway.fakes import FakeInstance
from tests.gateway.http.service import (
    MODEL,
    PROMPT,
    Service,
    content_parts,
    events,
    failure,
    sample,
    serving,
    tool_call_message,
)
from tests.gateway.running import IMPATIENT
from tests.waiting import eventually


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
        ("completions", {"n": 16385}, "n"),
        ("completions", {"stream": "maybe"}, "stream"),
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
        ("chat/completions", {"messages": [content_parts({"type": "text", "text": 5})]}, "messages.0.content.0.text"),
        ("chat/completions", {"messages": [content_parts("a", {"type": "image_url"})]}, "messages.0.content.1"),
        ("chat/completions", {"messages": [content_parts({"type": "input_audio"})]}, "messages.0.content.0"),
        ("chat/completions", {"messages": [content_parts({"image": "x"})]}, "messages.0.content.0.image"),
        ("chat/completions", {"messages": [tool_call_message("x")]}, "messages.0.tool_calls.0"),
        ("chat/completions", {"messages": [tool_call_message({"type": "custom"})]}, "messages.0.tool_calls.0.type"),
        ("chat/completions", {"messages": [tool_call_message({})]}, "messages.0.tool_calls.0.function"),
        (
            "chat/completions",
            {"messages": [tool_call_message({"function": {}})]},
            "messages.0.tool_calls.0.function.name",
        ),
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
        ("chat/completions", {"response_format": {"type": "xml"}}, "response_format.type"),
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
        (
            "chat/completions",
            {"messages": [tool_call_message({"function": {"name": "f", "arguments": [1]}})]},
            "JSON as text",
        ),
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
    monkeypatch.setattr(shared.gateway.text, "chat_template", None)
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
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    fakes[1].models, fakes[2].models = ["tiny"], [MODEL]  # by either an instance is known as ours
    async with serving(fakes, model_folder, tuning=IMPATIENT, served_model_name=["tiny", "small"]) as service:
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
    error = failure(await shared.complete(max_tokens=4097), 400)
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
        ({"messages": [{"role": "user", "content": "a"}], "tools": [_TOOL], "tool_choice": "none"}, True),
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
    monkeypatch.setattr(text, "chat_text", noted(text.chat_text))
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
    absent = FakeInstance("absent", "both")
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

    monkeypatch.setattr(service.gateway, "generate", broken)
    error = failure(await service.complete(), 500)
    assert "a bug" not in error["message"]
    monkeypatch.undo()
    assert (await service.complete()).status_code == 200
