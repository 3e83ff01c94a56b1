"""A gateway on a real server over fake instances, for the tests of its routes."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from ares.config import GatewayConfig
from ares.gateway.http import app as application
from ares.gateway.http.responses import DirectSend
from ares.gateway.models import Models, ServedModel
from ares.gateway.tuning import DEFAULT, Tuning
from tests.gateway.fakes import FakeInstance, free_port
from tests.waiting import eventually

MODEL = "some/model"
PROMPT = [10, 20, 30, 40, 50]


class Server(uvicorn.Server):
    """Leaves the signals to pytest."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


class Service:
    """A running gateway and a client of it."""

    def __init__(self, models: Models, client: httpx.AsyncClient, fakes: list[FakeInstance], port: int) -> None:
        self.models, self.gateway = models, models.first
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
async def serving(
    fakes: list[FakeInstance], folder: Path, tuning: Tuning = DEFAULT, further: Sequence[Path] = (), **settings: Any
) -> AsyncIterator[Service]:
    """Serve; `further` are the folders of the models after the first, where the settings have `models`."""
    defaults: dict[str, Any] = {
        **({} if "models" in settings else {"model": MODEL}),
        "preset": "off",
        "telemetry_interval_s": 0.02,
        "workers": [f.url for f in fakes],
    }
    first, *others = GatewayConfig(**(defaults | settings)).of_models()
    models = [ServedModel(*one) for one in zip(others, further, strict=True)]
    app = application.build(first, folder, tuning, further=models)
    port = free_port()
    server = Server(
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
        yield Service(app.state.models, client, fakes, port)
    server.should_exit = True
    await asyncio.wait_for(task, 60)


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


def tool_call_message(call: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [call]}


def content_parts(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*parts]}
