"""Requests in other forms: HEAD, and paths with other slashes."""

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.gateway.fakes import FakeInstance
from tests.gateway.http.service import MODEL, PROMPT, Service, failure, serving

BODY = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2}
READ = ["/health", "/ready", "/version", "/v1/models", f"/v1/models/{MODEL}", "/docs", "/openapi.json", "/dashboard"]


@pytest.mark.parametrize("path", [*READ, "/dashboard/dashboard.css", "/metrics", "/admin/v1/status"])
async def test_head_is_get_without_the_body(shared: Service, path: str) -> None:
    got, head = await shared.client.get(path), await shared.client.head(path)
    assert got.status_code == head.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]
    if path in READ:
        assert head.headers["content-length"] == got.headers["content-length"]


async def test_head_of_a_stream_of_events_ends(shared: Service) -> None:
    head = await asyncio.wait_for(shared.client.head("/admin/v1/events"), 60)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith("text/event-stream")
    # The connection is as it was before.
    assert (await shared.client.get("/health")).status_code == 200


async def test_head_where_there_is_no_get(shared: Service) -> None:
    head = await shared.client.head("/v1/completions")
    assert (head.status_code, head.headers["allow"], head.content) == (405, "POST", b"")
    assert (await shared.client.head("/nothing/here")).status_code == 404


async def test_a_method_that_is_not_allowed(shared: Service) -> None:
    reply = await shared.client.post("/v1/models", json={})
    assert failure(reply, 405)["message"] == "POST is not allowed for /v1/models; allowed: GET, HEAD"
    assert reply.headers["allow"] == "GET, HEAD"
    reply = await shared.client.get("/v1/chat/completions")
    assert failure(reply, 405)["message"] == "GET is not allowed for /v1/chat/completions; allowed: POST"


@pytest.mark.parametrize("path", ["/v1/completions/", "//v1/completions", "/v1//completions", "///v1/completions//"])
async def test_slashes_that_mean_nothing(shared: Service, path: str) -> None:
    reply = await shared.client.post(f"http://127.0.0.1:{shared.port}{path}", json=BODY)
    assert reply.status_code == 200
    assert reply.json()["model"] == MODEL


@pytest.mark.parametrize("path", ["/dashboard", "/docs"])
async def test_a_page_with_relative_links_stays_where_they_lead(shared: Service, path: str) -> None:
    redirected = await shared.client.get(f"{path}/", follow_redirects=True)
    assert (redirected.status_code, redirected.url.path) == (200, path)


async def test_other_slashes_lead_past_no_key(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder, api_keys=["k" * 40], admin_key="a" * 40) as service:
        for path in ("//v1/models", "/v1/models/", "//admin/v1/status", "/admin//v1/status", "/admin/v1/status/"):
            failure(await service.client.get(f"http://127.0.0.1:{service.port}{path}"), 401)
            failure(await service.client.get(f"http://127.0.0.1:{service.port}/health/..{path}"), 401)
        for path in ("/health/", "//ready", "/version/"):
            assert (await service.client.get(f"http://127.0.0.1:{service.port}{path}")).status_code in (200, 503)


@pytest.mark.parametrize("name", [MODEL, MODEL.replace("/", "%2F"), f"{MODEL}/"])
async def test_one_model(shared: Service, name: str) -> None:
    listed = (await shared.client.get("/v1/models")).json()["data"]
    reply = await shared.client.get(f"/v1/models/{name}")
    assert (reply.status_code, reply.json()) == (200, listed[0])


async def test_a_model_that_is_not_served(shared: Service) -> None:
    found = failure(await shared.client.get("/v1/models/some/other"), 404)
    assert (found["code"], found["param"]) == ("model_not_found", "model")
    assert "`some/other`" in found["message"]


def ids(reply: httpx.Response) -> tuple[int, str | None]:
    return reply.status_code, reply.headers.get("x-request-id")


async def test_errors_repeat_the_request_id(shared: Service) -> None:
    mine = {"x-request-id": "mine-1"}
    assert ids(await shared.client.post("/v1/completions", json={}, headers=mine)) == (400, "mine-1")
    assert ids(await shared.client.post("/v1/completions", content=b"{", headers=mine)) == (415, "mine-1")
    assert ids(await shared.client.get("/nothing/here", headers=mine)) == (404, "mine-1")
    assert ids(await shared.client.get("/nothing/here", headers={"x-request-id": "a b"})) == (404, None)
