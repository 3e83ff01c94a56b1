"""The routes that a real instance adds to vLLM's API server, and its end by SIGTERM; without an engine."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY

from ares.engine import identity as settings
from ares.engine.plugin import InstancePlugin
from ares.protocol import messages
from tests.engine.control_channel import Gateway, Instance
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(60)


class Served:
    """An application with the routes, and a client of it."""

    def __init__(self, instance: Instance, monkeypatch: pytest.MonkeyPatch, drain_deadline_s: float = 0.0) -> None:
        monkeypatch.setenv("ARES_INSTANCE", "")
        monkeypatch.delenv("ARES_CONTROL_KEY", raising=False)
        settings.export(
            settings.InstanceSettings("decode-0", "decode", "boot", instance.address, drain_deadline_s=drain_deadline_s)
        )
        self.app = FastAPI()
        InstancePlugin().attach_router(self.app)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://instance")

    @contextlib.asynccontextmanager
    async def alive(self) -> AsyncIterator[httpx.AsyncClient]:
        async with self.app.router.lifespan_context(self.app):
            yield self.http

    async def readiness(self) -> tuple[int, str]:
        reply = await self.http.get("/ares/v1/ready")
        return reply.status_code, reply.json()["status"]

    async def becomes(self, wanted: tuple[int, str]) -> None:
        async with asyncio.timeout(60):
            while await self.readiness() != wanted:  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0.01)


async def test_the_description(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Served(instance, monkeypatch).alive() as http:
        assert (await http.get("/ares/v1/instance")).json() == {
            "name": "decode-0",
            "role": "decode",
            "boot": "boot",
            "control_address": instance.address,
        }


async def test_its_metrics_have_the_forecast_while_it_serves(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capacity() -> float | None:
        return REGISTRY.get_sample_value("ares:kv_capacity_tokens")

    async with Served(instance, monkeypatch).alive():
        await eventually(lambda: capacity() == 1600)
        assert REGISTRY.get_sample_value("ares:draining") == 0
    assert capacity() is None


@pytest.mark.parametrize(
    ("served", "names"),
    [
        (["HuggingFaceTB/SmolLM2-135M-Instruct"], ["HuggingFaceTB/SmolLM2-135M-Instruct"]),
        (["one", "two"], ["one", "two"]),
        (None, ["{folder}"]),
        (["model"], ["{folder}"]),
    ],
)
async def test_which_model_it_serves(
    instance: Instance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, served: list[str] | None, names: list[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 576, "vocab_size": 49152, "model_type": "llama"}')
    monkeypatch.chdir(tmp_path)
    served_app = Served(instance, monkeypatch)
    identity = settings.InstanceSettings("decode-0", "decode", "boot", instance.address, model="model")
    settings.export(identity)
    plugin = InstancePlugin()
    app = FastAPI()
    plugin.attach_router(app)
    # As vLLM does before it serves; `ares worker` gives it the folder.
    args = SimpleNamespace(served_model_name=served, model=str(folder), lora_modules=[SimpleNamespace(name="poems")])
    await plugin.init_state(None, app.state, args)
    served_app.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://instance")
    described = (await served_app.http.get("/ares/v1/instance")).json()
    assert described["models"] == [name.format(folder=folder) for name in names]
    assert described["shape"] == {"hidden_size": 576, "vocab_size": 49152}
    assert described["adapters"] == ["poems"]


async def test_it_is_ready_from_the_first_telemetry_until_it_drains(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(instance, monkeypatch)
    assert await served.readiness() == (503, "starting")
    async with served.alive():
        await served.becomes((200, "ready"))
        gateway = Gateway(instance.address)
        gateway.send(messages.Drain(True, 60.0))
        await served.becomes((503, "draining"))
        gateway.send(messages.Drain(False))
        await served.becomes((200, "ready"))
        gateway.close()


@pytest.mark.engines
async def test_a_draining_instance_is_healthy(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own health route next to ours: a supervisor must not restart an instance because it drains."""
    pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
    from vllm.entrypoints.serve.instrumentator.health import router

    async def check_health() -> None:
        """Be healthy."""

    served = Served(instance, monkeypatch)
    served.app.include_router(router)
    served.app.state.engine_client = SimpleNamespace(check_health=check_health)
    async with served.alive() as http:
        instance.channel.drain(True)
        await served.becomes((503, "draining"))
        assert (await http.get("/health")).status_code == 200


async def test_a_sigterm_drains_it_and_then_ends_it(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: ended.set())
    served = Served(instance, monkeypatch, drain_deadline_s=20)
    try:
        async with served.alive():
            await served.becomes((200, "ready"))
            os.kill(os.getpid(), signal.SIGTERM)
            await served.becomes((503, "draining"))
            assert not ended.is_set(), "a gateway may not know of the drain yet"
            await eventually(ended.is_set)
    finally:
        signal.signal(signal.SIGINT, before)
