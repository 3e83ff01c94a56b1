"""What the log tells (docs/security.md): what happened, and nothing of prompts and outputs."""

import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from ares.gateway.pool.delta import EngineRefusedError
from tests.gateway.fakes import FakeInstance
from tests.gateway.http.service import Service, serving
from tests.waiting import eventually

TOLD = "The vault opens at 04:17 with Persephone's key"
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"  # as gateway/http/server.py has it, with tracebacks


async def ask(service: Service) -> list[httpx.Response]:
    """Ask for the secret on all routes."""
    replies = []
    for stream in (False, True):
        replies.append(await service.complete(prompt=TOLD, stream=stream))
        replies.append(await service.complete(prompt=[TOLD] * 2, n=2, stop=[TOLD], stream=stream))
        messages = [{"role": "user", "content": TOLD}]
        tools = [{"function": {"name": "f", "description": TOLD}}]
        replies.append(await service.chat(messages=messages, stream=stream, tools=tools, tool_choice="none"))
    return replies


def log_of(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> str:
    formatter = logging.Formatter(FORMAT)
    return "\n".join([*map(formatter.format, caplog.records), *capfd.readouterr()])


def written(ids: list[int]) -> str:
    """As a log would show them; what is printed in part is found too."""
    return str(ids[:6])[1:-1]


def traces(tokenizer: Tokenizer, output: list[int]) -> list[str]:
    """What would give the secret away, or the output."""
    prompt = tokenizer.encode(TOLD).ids
    return [TOLD[:20], written(prompt), tokenizer.decode(output)[:6], written(output)]


async def test_what_is_served_is_not_logged(
    fakes: list[FakeInstance],
    model_folder: Path,
    byte_tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    async with serving(fakes, model_folder, preset="ares") as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        replies = await ask(service)
        assert [reply.status_code for reply in replies] == [200] * 6
        output = replies[0].json()["choices"][0]["token_ids"]
        name = service.gateway.name
    log = log_of(caplog, capfd)
    assert f"this gateway is called {name}" in log
    assert [one for one in traces(byte_tokenizer, output) if one in log] == []


async def test_what_fails_is_logged_without_its_prompt(
    fakes: list[FakeInstance],
    model_folder: Path,
    byte_tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)

    def quoting(status: int) -> Any:
        async def call(_: Any, body: dict[str, Any], *_others: Any, **__: Any) -> None:
            text = byte_tokenizer.decode(body["token_ids"])
            raise EngineRefusedError(status, f"cannot do {text!r}, which is {body['token_ids']}")

        return call

    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a fault of ours")

    async with serving(fakes, model_folder) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        output = (await service.complete(prompt=TOLD)).json()["choices"][0]["token_ids"]
        # An engine may quote what it was asked; that is for its client.
        for status in (400, 500):
            with monkeypatch.context() as patch:
                for call in ("stream", "complete"):
                    patch.setattr(f"ares.gateway.pool.generate.EngineClient.{call}", quoting(status))
                reply = await service.complete(prompt=TOLD)
                assert written(byte_tokenizer.encode(TOLD).ids) in reply.text
        with monkeypatch.context() as patch:
            patch.setattr(service.gateway, "generate", broken)
            await ask(service)
        # Refused by the gateway itself: no such role, no such prompt, too long, no JSON.
        json = {"Content-Type": "application/json"}
        refused = [
            await service.chat(messages=[{"role": TOLD, "content": TOLD}]),
            await service.complete(prompt={"text": TOLD}),
            await service.complete(prompt=TOLD * 200),
            await service.client.post("/v1/completions", content=TOLD, headers=json),
        ]
        assert [reply.status_code for reply in refused] == [400] * 4
    log = log_of(caplog, capfd)
    assert "a fault of ours" in log
    assert "Traceback" in log
    assert [one for one in traces(byte_tokenizer, output) if one in log] == []
