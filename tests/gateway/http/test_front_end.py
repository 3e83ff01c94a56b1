"""Settings with the names of flags of vLLM's front end: each does what the flag does in vLLM."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ares.config import ConfigError, GatewayConfig, load
from tests.gateway.fakes import instances
from tests.gateway.http.service import Service, events, failure, serving
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually

ORIGIN = "https://chat.example.com"


@pytest.fixture(scope="module")
async def service(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    folder = tmp_path_factory.mktemp("front end")
    template = folder / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}{{ mood }}")
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 7, "max_new_tokens": 6, "eos_token_id": 2}))
    tokenizer = Path(shutil.copytree(model_folder, folder / "tokenizer"))
    settings: dict[str, Any] = {
        "tokenizer": str(tokenizer),
        "chat_template": str(template),
        "default_chat_template_kwargs": {"mood": "calm"},
        "trust_request_chat_template": True,
        "response_role": "bot",
        "generation_config": str(folder),
        "override_generation_config": {"temperature": 0.3},
        "max_logprobs": 2,
        "return_tokens_as_token_ids": True,
        "enable_force_include_usage": True,
        "enable_prompt_tokens_details": True,
        "allowed_origins": [ORIGIN],
        "allowed_methods": ["POST"],
        "allowed_headers": ["X-Mine"],
        "api_keys": ["key"],
        "disable_fastapi_docs": True,
    }
    async with (
        instances("prefill", "decode", vocabulary=VOCABULARY) as fakes,
        serving(fakes, model_folder, **settings) as made,
    ):
        made.client.headers["Authorization"] = "Bearer key"
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in made.gateway.pool.instances), 15)
        yield made


def prompt(service: Service) -> str:
    return service.gateway.text.decode(service.fakes[0].asked[-1]["token_ids"])


async def test_the_chat_template_and_its_variables(service: Service) -> None:
    await service.chat()
    assert prompt(service) == "user=Hi;calm"
    await service.chat(chat_template_kwargs={"mood": "wild"})
    assert prompt(service) == "user=Hi;wild"
    await service.chat(chat_template_kwargs={"mood": None})  # vLLM takes null and "auto" as not set
    assert prompt(service) == "user=Hi;calm"
    await service.chat(chat_template="{{ messages[0].content }}{{ mood }}")
    assert prompt(service) == "Hicalm"
    error = failure(await service.chat(chat_template="{% for %}"), 400)
    assert error["param"] == "messages"


async def test_the_role_of_answers(service: Service) -> None:
    assert (await service.chat()).json()["choices"][0]["message"]["role"] == "bot"
    first = events((await service.chat(stream=True)).text)[0]
    assert first["choices"][0]["delta"]["role"] == "bot"
    turns = [{"role": "user", "content": "a"}, {"role": "critic", "content": "b"}]
    body = (await service.chat(messages=turns, add_generation_prompt=False)).json()
    assert body["choices"][0]["message"]["role"] == "critic"


async def test_the_defaults_of_sampling_and_the_cap_of_outputs(service: Service) -> None:
    reply = (await service.chat(max_tokens=50, ignore_eos=True)).json()
    assert reply["usage"]["completion_tokens"] == 6
    asked = service.fakes[0].asked[-1]["sampling_params"]
    assert (asked["top_k"], asked["temperature"], asked.get("top_p")) == (7, 0.3, None)
    assert (await service.complete(ignore_eos=True, max_tokens=None)).json()["usage"]["completion_tokens"] == 6


async def test_log_probabilities(service: Service) -> None:
    choice = (await service.complete(logprobs=2, max_tokens=2)).json()["choices"][0]
    assert all(token.startswith("token_id:") for token in choice["logprobs"]["tokens"])
    choice = (await service.complete(logprobs=2, max_tokens=2, return_tokens_as_token_ids=False)).json()["choices"][0]
    assert not any(token.startswith("token_id:") for token in choice["logprobs"]["tokens"])
    assert failure(await service.complete(logprobs=3), 400)["param"] == "logprobs"
    assert failure(await service.chat(logprobs=True, top_logprobs=3), 400)["param"] == "top_logprobs"


async def test_every_stream_has_its_usage(service: Service) -> None:
    for ask in (service.chat, service.complete):
        *chunks, last = events((await ask(stream=True, max_tokens=3)).text)
        assert all("usage" in chunk for chunk in chunks)
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)


async def test_the_usage_says_what_the_prefill_instance_had_cached(service: Service) -> None:
    none = {"cached_tokens": 0}  # mock engines cache no prefixes
    for ask in (service.chat, service.complete):
        assert (await ask(max_tokens=3)).json()["usage"]["prompt_tokens_details"] == none
        assert (await ask(max_tokens=1)).json()["usage"]["prompt_tokens_details"] == none
        *_, last = events((await ask(stream=True, max_tokens=3)).text)
        assert last["usage"]["prompt_tokens_details"] == none


async def test_pages_of_an_allowed_origin(service: Service) -> None:
    asking = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "X-Mine"}
    async with httpx.AsyncClient(base_url=service.client.base_url) as browser:  # has no key when it asks
        reply = await browser.options("/v1/chat/completions", headers=asking)
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, ORIGIN)
        refused = (
            {"Origin": "https://other.example.com"},
            {"Access-Control-Request-Method": "DELETE"},
            {"Access-Control-Request-Headers": "X-Other"},
        )
        for other in refused:
            assert (await browser.options("/v1/chat/completions", headers=asking | other)).status_code == 400
        for path in ("/admin/v1/status", "/admin/v1/events"):  # a browser on this machine is no operator
            reply = await browser.options(path, headers=asking)
            assert (reply.status_code, "access-control-allow-origin" in reply.headers) == (405, False)
        assert (await browser.post("/v1/completions", json={}, headers={"Origin": ORIGIN})).status_code == 401
    for stream in (False, True):
        reply = await service.client.post(
            "/v1/completions", json={"prompt": "a", "max_tokens": 1, "stream": stream}, headers={"Origin": ORIGIN}
        )
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, ORIGIN)


async def test_no_description_of_the_routes(service: Service, model_folder: Path) -> None:
    for path in ("/docs", "/openapi.json"):
        assert (await service.client.get(path)).status_code == 404
    async with instances("both", vocabulary=VOCABULARY) as fakes, serving(fakes, model_folder) as plain:
        for path in ("/docs", "/openapi.json"):
            assert (await plain.client.get(path)).status_code == 200


async def test_comments_keep_an_idle_stream_alive(model_folder: Path) -> None:
    async with (
        instances("prefill", "decode", vocabulary=VOCABULARY) as fakes,
        serving(fakes, model_folder, sse_keep_alive_interval=0.1) as service,
    ):
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        fakes[0].faults.hang = True
        lines: list[str] = []

        async def read() -> None:
            body = {"prompt": [10, 20], "max_tokens": 3, "stream": True}
            async with service.client.stream("POST", "/v1/completions", json=body) as reply:
                async for line in reply.aiter_lines():
                    lines.append(line)
                    if lines.count(": keep-alive") >= 3:
                        return

        await asyncio.wait_for(read(), 60)
        assert lines == [": keep-alive", ""] * 2 + [": keep-alive"]


@pytest.mark.parametrize(("content_format", "shown"), [("auto", "a\nb"), ("string", "a\nb"), ("openai", "[{")])
async def test_the_format_of_content(model_folder: Path, content_format: str, shown: str) -> None:
    settings = {"chat_template": "{{ messages[0].content }}", "chat_template_content_format": content_format}
    async with instances("both", vocabulary=VOCABULARY) as fakes, serving(fakes, model_folder, **settings) as service:
        texts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        await service.chat(messages=[{"role": "user", "content": texts}], max_tokens=1)
        assert prompt(service).startswith(shown)


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": "m", "workers": ["http://127.0.0.1:1"]}
    for wrong in (
        {"chat_template": str(tmp_path / "no.jinja")},
        {"generation_config": str(tmp_path)},
        {"chat_template_content_format": "xml"},
        {"max_logprobs": -2},
        {"sse_keep_alive_interval": -1},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            load(**given, **wrong)
    text = "{{ messages }}"
    assert GatewayConfig(**given, chat_template=text).chat_template == text
    assert GatewayConfig(**given, chat_template="tool_use").chat_template == "tool_use"
