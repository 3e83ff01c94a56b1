"""Instances that are added and removed by hand, and `/workers` as users of vllm-router know it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from ares.gateway.tuning import Tuning
from tests.gateway.fakes import FakeInstance, expected, free_port, instances
from tests.gateway.http.service import PROMPT, Service, failure, serving
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually

ROUTE = "/admin/v1/instances"
QUICK = Tuning(reconnect_s=0.02, drain_period_s=0.02, duplicate_check_s=0.05)


@pytest.fixture
async def empty(model_folder: Path) -> AsyncIterator[Service]:
    """A gateway without instances."""
    async with serving([], model_folder, QUICK, service_discovery=["api"]) as service:
        yield service


@pytest.fixture
async def pair() -> AsyncIterator[list[FakeInstance]]:
    async with instances("decode", "decode", vocabulary=VOCABULARY) as fakes:
        yield fakes


def states(service: Service) -> list[tuple[str, str]]:
    return [(change.instance, change.state) for change in service.gateway.pool.changes.since(0)]


async def added(service: Service, fake: FakeInstance) -> dict[str, Any]:
    reply = await service.client.post(ROUTE, json={"url": fake.url})
    assert reply.status_code == 200, reply.text
    await eventually(lambda: any(i.open and i.url == fake.url for i in service.gateway.pool.instances))
    return dict(reply.json())


async def removed(service: Service, given: str, **query: Any) -> httpx.Response:
    return await service.client.delete(f"{ROUTE}/{quote(given, safe='')}", params=query)


async def test_a_gateway_without_instances_says_what_it_waits_for(
    empty: Service, pair: list[FakeInstance], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ares")
    error = failure(await empty.client.get("/ready"), 503)
    assert error["message"] == "no decode instance is ready: no instance is known; waiting for one from api"
    row = await added(empty, pair[0])
    assert (row["url"], row["name"], row["role"], row["named_by"]) == (pair[0].url, pair[0].url, None, ["the API"])
    assert row["new"]
    assert (await empty.client.get("/ready")).status_code == 200
    reply = await empty.complete()
    assert reply.json()["choices"][0]["token_ids"] == expected(PROMPT, 20, vocabulary=VOCABULARY)
    again = await empty.client.post(ROUTE, json={"url": f"{pair[0].url}/"})
    assert (again.json()["new"], again.json()["name"], again.json()["role"]) == (False, "decode-0", "decode")
    assert again.json()["boot"] == pair[0].boot
    lines = [record.getMessage() for record in caplog.records if pair[0].url in record.getMessage()]
    lines = [line for line in lines if "which model" not in line]
    assert lines == [f"{pair[0].url} joins: the API names it", f"decode-0 ({pair[0].url}) is ready"]


async def test_one_that_is_removed_keeps_its_streams_until_they_have_moved(
    empty: Service, pair: list[FakeInstance], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ares")
    await added(empty, pair[0])
    pair[0].hold_at = pair[1].hold_at = 20
    stream = asyncio.create_task(empty.complete(max_tokens=60))
    await eventually(lambda: bool(pair[0].running))
    error = failure(await removed(empty, "decode-0"), 409)
    assert "decode-0 is the last open instance that decodes" in error["message"]
    assert "?force=true" in error["message"]
    await added(empty, pair[1])
    row = (await removed(empty, pair[0].url)).json()
    assert (row["open"], row["leaving"], row["named_by"]) == (False, True, [])
    assert row["why"] == "is leaving and takes no new requests: it was removed by the API"
    pair[0].hold_at = pair[1].hold_at = None
    assert (await stream).json()["choices"][0]["token_ids"] == expected(PROMPT, 60, vocabulary=VOCABULARY)
    await eventually(lambda: len(empty.gateway.pool.instances) == 1)
    assert "decode-0" not in (await empty.client.get("/metrics")).text
    assert [state for name, state in states(empty) if name == "decode-0"] == ["ready", "leaving", "gone"]
    told = [record.getMessage() for record in caplog.records if "decode-0 (" in record.getMessage()]
    assert told[-1] == f"decode-0 ({pair[0].url}) is gone: it was removed by the API"
    status = (await empty.client.get(ROUTE)).json()
    assert [one["name"] for one in status["instances"]] == ["decode-1"]
    assert status["sources"] == [{"name": "api", "problem": None}]
    assert status["changes"][-1]["state"] == "gone"
    assert (await empty.complete()).status_code == 200


async def test_what_is_added_again_while_it_leaves_stays(empty: Service, pair: list[FakeInstance]) -> None:
    await added(empty, pair[0])
    pair[0].hold_at = 20
    stream = asyncio.create_task(empty.complete(max_tokens=60))
    await eventually(lambda: bool(pair[0].running))
    assert (await removed(empty, "decode-0", force=True)).json()["leaving"]
    await added(empty, pair[0])
    pair[0].hold_at = None
    assert (await stream).status_code == 200
    assert [state for _, state in states(empty)] == ["joined", "ready", "leaving", "ready"]
    assert [one.name for one in empty.gateway.pool.instances] == ["decode-0"]


async def test_at_the_deadline_what_is_left_resumes_elsewhere(empty: Service, pair: list[FakeInstance]) -> None:
    await added(empty, pair[0])
    pair[0].hold_at = 20
    stream = asyncio.create_task(empty.complete(max_tokens=60))
    await eventually(lambda: bool(pair[0].running))
    await added(empty, pair[1])
    assert (await removed(empty, "decode-0", deadline_s=0)).status_code == 200
    assert (await stream).json()["choices"][0]["token_ids"] == expected(PROMPT, 60, vocabulary=VOCABULARY)
    await eventually(lambda: [i.name for i in empty.gateway.pool.instances] == ["decode-1"])


async def test_one_that_nobody_reaches_goes_at_once(empty: Service) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    await empty.client.post(ROUTE, json={"url": url})
    await eventually(lambda: bool(empty.gateway.pool.instances[0].health.why))
    assert (await removed(empty, url)).json()["leaving"]
    await eventually(lambda: not empty.gateway.pool.instances)
    failure(await removed(empty, url), 404)


async def test_an_instance_at_a_new_url_is_followed_there(empty: Service, pair: list[FakeInstance]) -> None:
    """It is what it says of itself, not its address."""
    await added(empty, pair[0])
    other = pair[0].url.replace("127.0.0.1", "localhost")
    assert (await empty.client.post(ROUTE, json={"url": other})).json()["new"]
    await eventually(lambda: any(state == "duplicate" for _, state in states(empty)))
    assert (await removed(empty, pair[0].url, force=True)).status_code == 200
    # Its first URL is not named any more, but used as long as it leads to what the second one names.
    assert [(i.name, i.open) for i in empty.gateway.pool.instances] == [("decode-0", True)]
    assert (await empty.complete()).status_code == 200
    await removed(empty, other, force=True)
    await eventually(lambda: not empty.gateway.pool.instances)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"url": "decode:8100"}, "is not the URL of an instance"),
        ({"url": "http://me:secret@h:1"}, "has a user name or password"),
        ({"url": "http://h:1/v1"}, "give the URL of the instance itself"),
        ({"url": "http://h:1", "role": "decode"}, "role: Extra inputs are not permitted"),
        ({}, "url: Field required"),
    ],
)
async def test_what_cannot_be_added(empty: Service, body: dict[str, str], said: str) -> None:
    for route in (ROUTE, "/workers"):
        error = failure(await empty.client.post(route, json=body), 400)
        assert said in error["message"]
        assert "secret" not in error["message"]
    assert not empty.gateway.pool.instances


async def test_workers_as_vllm_router_has_them(empty: Service, pair: list[FakeInstance]) -> None:
    reply = await empty.client.post("/workers", json={"url": pair[0].url})
    assert reply.json() == {"success": True, "message": f"Successfully added worker: {pair[0].url}"}
    location = f"/workers/{quote(pair[0].url, safe='')}"
    await eventually(lambda: empty.gateway.pool.ready)
    await added(empty, pair[1])
    listed = (await empty.client.get("/workers")).json()
    assert (listed["total"], listed["stats"]) == (
        2,
        {"prefill_count": 0, "decode_count": 2, "regular_count": 0},
    )
    worker = listed["workers"][0]
    assert (worker["url"], worker["worker_type"], worker["is_healthy"]) == (pair[0].url, "decode", True)
    assert (await empty.client.get(location)).json() == worker
    # As it is, with its slashes, too.
    assert (await empty.client.get(f"/workers/{pair[0].url}")).json() == worker
    gone = await empty.client.delete(location)
    assert gone.json() == {"success": True, "message": f"Worker {pair[0].url} is being removed"}
    await eventually(lambda: len(empty.gateway.pool.instances) == 1)
    failure(await empty.client.get(location), 404)
    failure(await empty.client.delete("/workers/nonsense"), 404)
    failure(await empty.client.delete("/workers/http:["), 404)


async def test_they_need_the_admin_key(model_folder: Path) -> None:
    keys = {"admin_key": "secret", "api_keys": ["clients"]}
    async with serving([], model_folder, service_discovery=["api"], **keys) as service:
        for route in (ROUTE, "/workers"):
            failure(await service.client.get(route), 401)
            failure(await service.client.get(route, headers={"Authorization": "Bearer clients"}), 401)
            assert (await service.client.get(route, headers={"Authorization": "Bearer secret"})).status_code == 200
            failure(await service.client.post(route, json={"url": "http://h:1"}), 401)
            failure(await service.client.delete(f"{route}/x"), 401)
