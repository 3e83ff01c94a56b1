"""Every request that is answered with an error is counted, by route, status and reason; the labels have few values."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import httpx
import pytest
import uvicorn

from ares.gateway.http.connection import Connection, Limits
from ares.gateway.http.refusals import reason
from tests.gateway.fakes import FakeInstance, free_port
from tests.gateway.http.service import MODEL, PROMPT, Server, Service, serving
from tests.gateway.running import IMPATIENT
from tests.waiting import eventually

KEY, ADMIN = "alice-" + "a" * 32, "admin-" + "b" * 32
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def counted(service: Service) -> dict[tuple[str, str, str], float]:
    return {
        (s.labels["route"], s.labels["status"], s.labels["reason"]): s.value
        for family in service.gateway.metrics.registry.collect()
        for s in family.samples
        if s.name == "ares_http_refused_total"
    }


@pytest.fixture
async def service(fakes: list[FakeInstance], model_folder: Path) -> AsyncIterator[Service]:
    settings = {"api_keys": [KEY], "admin_key": ADMIN, "maximum_streams_per_key": 2, "max_body_bytes": 5000}
    async with serving(fakes, model_folder, **settings) as made:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in made.gateway.pool.instances), 15)
        yield made


async def test_what_the_layers_before_the_routes_refuse(service: Service) -> None:
    client, mine = service.client, {"Authorization": f"Bearer {KEY}"}
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 5}
    for _ in range(2):
        assert (await client.post(COMPLETIONS, json=body)).status_code == 401
    assert (await client.get("/admin/v1/status", headers=mine)).status_code == 401
    assert (await client.post(COMPLETIONS, content=b" " * 6000, headers=mine)).status_code == 413
    assert (await client.get("/nothing/here", headers=mine)).status_code == 404
    assert (await client.get(f"/{'x' * 50}", headers=mine)).status_code == 404
    assert (await client.get(COMPLETIONS, headers=mine)).status_code == 405
    assert (await client.post(COMPLETIONS, json=body, headers=mine)).status_code == 200
    assert counted(service) == {
        (COMPLETIONS, "401", "invalid_api_key"): 2,
        ("/admin/v1/status", "401", "invalid_api_key"): 1,
        (COMPLETIONS, "413", "body_too_large"): 1,
        ("other", "404", "not_found"): 2,
        (COMPLETIONS, "405", "method_not_allowed"): 1,
    }


async def test_what_the_routes_refuse(service: Service) -> None:
    service.client.headers = httpx.Headers({"Authorization": f"Bearer {KEY}"})
    assert (await service.complete(max_tokens="many")).status_code == 400
    assert (await service.complete(model="other")).status_code == 404
    assert (await service.complete(max_tokens=100_000)).status_code == 400
    assert (await service.complete(n=3)).status_code == 429
    assert (await service.chat(messages=[])).status_code == 400
    as_operator = {"Authorization": f"Bearer {ADMIN}"}
    order = {"request_id": "nobody", "target": "decode-0"}
    assert (await service.client.post("/admin/v1/migrations", json=order, headers=as_operator)).status_code == 404
    drain = "/admin/v1/instances/prefill-0/drain"
    assert (await service.client.post(drain, headers=as_operator)).status_code == 409
    assert counted(service) == {
        (COMPLETIONS, "400", "invalid_request"): 1,
        (COMPLETIONS, "404", "model_not_found"): 1,
        (COMPLETIONS, "400", "context_length_exceeded"): 1,
        (COMPLETIONS, "429", "rate_limit_exceeded"): 1,
        (CHAT, "400", "invalid_request"): 1,
        ("/admin/v1/migrations", "404", "request_not_found"): 1,
        ("/admin/v1/instances/{name:path}/drain", "409", "last_instance"): 1,
    }


async def test_what_cannot_be_served(
    fakes: list[FakeInstance], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(fakes, model_folder, maximum_waiting=1) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        fakes[0].faults.hang = True
        waiting = asyncio.create_task(service.complete())
        await eventually(lambda: len(service.gateway.backlog) == 1, 15)
        full = await service.complete()
        assert (full.status_code, full.json()["error"]["code"]) == (503, "queue_full")
        waiting.cancel()
        await eventually(lambda: len(service.gateway.backlog) == 0, 15)
        fakes[0].faults.hang = False
        for fake in fakes:
            fake.faults.refuse = 500
        assert (await service.complete()).status_code == 502
        # In a stream, whose status has been sent.
        assert "error" in (await service.complete(stream=True)).text
        for fake in fakes:
            fake.faults.refuse = None
        monkeypatch.setattr(service.gateway, "generate", lambda *_, **__: 1 / 0)
        assert (await service.complete()).status_code == 500
        service.gateway.shutdown.begun = True
        assert (await service.complete()).json()["error"]["code"] == "shutting_down"
        assert (await service.client.get("/ready")).status_code == 503
        assert counted(service) == {
            (COMPLETIONS, "503", "queue_full"): 1,
            (COMPLETIONS, "502", "instance_failed"): 2,
            (COMPLETIONS, "500", "internal_error"): 1,
            (COMPLETIONS, "503", "shutting_down"): 1,
            ("/ready", "503", "shutting_down"): 1,
        }


async def test_what_is_no_request() -> None:
    counts: list[tuple[str, int, str | None]] = []
    port = free_port()
    http = partial(Connection, Limits(1000, 30.0, 30.0), lambda *what: counts.append(what))
    server = Server(uvicorn.Config(_nothing, port=port, http=http, lifespan="off", log_config=None))  # type: ignore[arg-type]
    task = asyncio.create_task(server.serve())
    await eventually(lambda: server.started, 20)
    try:
        for head in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 2000 + b"\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head)
            await asyncio.wait_for(reader.read(-1), 60)
            writer.close()
    finally:
        server.should_exit = True
        await task
    assert counts == [("other", 400, "malformed_http"), ("other", 431, None)]
    assert [reason(status, code) for _, status, code in counts] == ["malformed_http", "head_too_large"]


async def _nothing(*_: object) -> None:
    raise AssertionError("no request reaches the application")


def test_reasons_are_a_closed_set() -> None:
    assert reason(409, "not_decoding") == "conflict"
    assert reason(400, "whatever an engine says") == "invalid_request"
    assert reason(418, None) == "invalid_request"
    assert reason(504, "x") == "server_error"


async def test_the_gauges_of_an_instance_that_is_down_go(fakes: list[FakeInstance], model_folder: Path) -> None:
    fakes[1].predicts = lambda _: (5.0, 10.0, 20.0)
    fakes[1].hold_at = fakes[2].hold_at = 15
    async with serving(fakes, model_folder, tuning=IMPATIENT) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)

        async def shown(name: str) -> set[str]:
            lines = (await service.client.get("/metrics")).text.splitlines()
            return {line.partition("{")[0] for line in lines if f'instance="{name}"' in line}

        running = [asyncio.create_task(service.complete()) for _ in range(2)]
        await eventually(lambda: bool(fakes[1].running and fakes[2].running), 15)
        await asyncio.sleep(0.1)
        assert len(await shown("decode-0")) == 9
        await fakes[1].die()
        await eventually(lambda: not service.gateway.pool.find("decode-0").health.healthy, 15)  # type: ignore[union-attr]
        assert await shown("decode-0") == {"ares_instance_up"}
        assert 'ares_instance_up{instance="decode-0",role="decode"} 0.0' in (await service.client.get("/metrics")).text
        # Not under the name that it had before it said its own either.
        assert await shown(fakes[1].url) == set()
        assert len(await shown("decode-1")) >= 7
        await fakes[1].start()
        fakes[1].hold_at = fakes[2].hold_at = None
        for one in running:
            assert (await one).status_code == 200
        await eventually(lambda: service.gateway.pool.find("decode-0").health.healthy, 15)  # type: ignore[union-attr]
        assert len(await shown("decode-0")) == 9
