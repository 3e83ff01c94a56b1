"""The operator's routes: status, moves on command, and who may ask."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ares.config import GatewayConfig
from ares.gateway.http import app as application
from tests.gateway.fakes import FakeInstance, expected
from tests.gateway.http.service import MODEL, PROMPT, Service, failure, serving
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually


async def running(service: Service, maximum: int = 400) -> "asyncio.Task[httpx.Response]":
    task = asyncio.create_task(
        service.client.post(
            "/v1/completions",
            json={"prompt": PROMPT, "max_tokens": maximum, "return_token_ids": True},
            headers={"x-request-id": "mine"},
        )
    )
    await eventually(lambda: "mine" in service.gateway.sessions)
    await eventually(lambda: service.gateway.sessions["mine"].unmovable_now() is None)
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
        await eventually(lambda: service.gateway.sessions[own].unmovable_now() is None)
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
