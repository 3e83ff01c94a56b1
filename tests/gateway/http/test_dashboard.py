"""`/dashboard` and the feed behind it, through a real server over fake instances."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from ares.gateway.http import dashboard
from ares.gateway.http import events as feed
from ares.gateway.http import status as own_status
from ares.gateway.http.responses import DirectSend
from ares.gateway.http.server import Server
from ares.gateway.session.handover import MigrationRecord
from ares.gateway.tuning import Tuning
from tests.gateway.fakes import FakeInstance, free_port, instances
from tests.gateway.http.service import Service, failure, serving
from tests.gateway.learner_reports import report
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually

FILES = {path.name: path.read_text() for path in (Path(dashboard.__file__).parent / "static").iterdir()}


QUICK = Tuning(feed_period_s=0.05)


@pytest.fixture(scope="module")
async def service(model_folder: Path) -> AsyncIterator[Service]:
    async with (
        instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes,
        serving(fakes, model_folder, QUICK) as made,
    ):
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in made.gateway.pool.instances), 15)
        yield made


@contextlib.asynccontextmanager
async def watching(service: Service, **headers: str) -> AsyncIterator[AsyncIterator[tuple[str, Any]]]:
    """Follow the feed."""
    async with service.client.stream("GET", "/admin/v1/events", headers=headers) as reply:
        assert reply.status_code == 200, await reply.aread()
        assert reply.headers["content-type"].startswith("text/event-stream")

        async def events() -> AsyncIterator[tuple[str, Any]]:
            name = ""
            async for line in reply.aiter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield name, json.loads(line.removeprefix("data: "))

        yield events()


async def following(events: AsyncIterator[tuple[str, Any]]) -> tuple[str, Any]:
    """The next event; instances may become ready in between."""
    return await anext(event async for event in events if event[0] != "changes")


async def until(events: AsyncIterator[tuple[str, Any]], wanted: Any) -> Any:
    """Return the data of the first event of which something is true."""
    async with asyncio.timeout(60):
        async for name, data in events:
            if wanted(name, data):
                return data
    raise AssertionError("the feed ended")


def move(number: int) -> MigrationRecord:
    return MigrationRecord(f"r{number}", "decode-0", "decode-1", "test", outcome="moved", started_at=float(number))


async def test_the_page_and_its_parts(service: Service) -> None:
    page = await service.client.get("/dashboard")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in re.findall(r'(?:src|href)="dashboard/([^"]+)"', page.text):
        part = await service.client.get(f"/dashboard/{name}")
        assert part.status_code == 200
        assert part.headers["x-content-type-options"] == "nosniff"
    failure(await service.client.get("/dashboard/nothing.js"), 404)
    failure(await service.client.get("/dashboard/..%2f..%2fapp.py"), 404)


def test_every_module_that_is_imported_ships() -> None:
    imported = {name for text in FILES.values() for name in re.findall(r'from "\./([^"]+)"', text)}
    assert imported
    assert imported <= set(FILES)


async def test_every_file_is_served_as_it_is(service: Service) -> None:
    for name, text in FILES.items():
        assert (await service.client.get(f"/dashboard/{name}")).text == text


def test_nothing_foreign_and_nothing_that_makes_markup_of_text() -> None:
    for name, text in FILES.items():
        assert set(re.findall(r"https?://[^\"'\s]+", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", text), name
        assert len(text.splitlines()) < 400, name
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|style=", FILES["dashboard.html"])


async def test_the_feed_shows_requests_as_they_run(service: Service) -> None:
    decode = service.fakes[1:]
    for fake in decode:
        fake.hold_at = 12
    async with watching(service) as events:
        first = await until(events, lambda name, _: name == "snapshot")
        assert [i["name"] for i in first["instances"]] == ["prefill-0", "decode-0", "decode-1"]
        assert first["requests"] == {}
        assert first["requests_total"] == 0
        request = asyncio.create_task(
            service.client.post(
                "/v1/completions",
                json={"model": "some/model", "prompt": [5, 6, 7], "max_tokens": 20},
                headers={"x-request-id": "<b>here</b>"},
            )
        )
        running = await until(events, lambda _, data: data["requests"] and data["requests"]["resident_tokens"] == [12])
        assert running["requests"]["id"] == ["<b>here</b>"]
        assert running["requests_total"] == 1
        for fake in decode:
            fake.hold_at = None
        assert (await request).status_code == 200
        done = await until(events, lambda _, data: data["requests_total"] == 0)
    assert done["recent"]["ttft_s"]["count"] >= 1
    assert done["recent"]["tpot_s"]["p99"] > 0
    assert done["recent"]["longest_gap_s"]["p50"] >= done["recent"]["tpot_s"]["p50"]  # it was held at the twelfth token
    status = (await service.client.get("/admin/v1/status")).json()
    assert status["recent"]["ttft_s"]["count"] >= 1
    assert status["instances"][0]["draining"] is False


async def test_moves_come_once_and_those_of_before_at_the_beginning(service: Service) -> None:
    service.gateway.migrations.extend(move(n) for n in range(3))
    async with watching(service) as events:
        before = await until(events, lambda name, _: name == "moves")
        assert [one["request_id"] for one in before][-3:] == ["r0", "r1", "r2"]
        service.gateway.migrations.extend(move(n) for n in range(3, 5))
        new = await until(events, lambda name, _: name == "moves")
        assert [one["request_id"] for one in new] == ["r3", "r4"]
        assert new[0]["reason"] == "test"
        # One snapshot and the next, and no move in between.
        await until(events, lambda name, _: name == "snapshot")
        assert (await following(events))[0] == "snapshot"


async def test_many_moves_at_once_leave_the_newest(service: Service) -> None:
    service.gateway.migrations.extend(move(n) for n in range(5000))
    async with watching(service) as events:
        moves = await until(events, lambda name, _: name == "moves")
    assert [one["request_id"] for one in moves] == [f"r{n}" for n in range(4800, 5000)]


async def test_changes_of_instances_come_with_their_reasons(service: Service) -> None:
    async with watching(service) as events:
        before = await until(events, lambda name, _: name == "changes")
        assert {(one["instance"], one["state"], one["why"]) for one in before} >= {("decode-0", "ready", "")}
        service.gateway.membership.remove(service.fakes[1].url, 60.0)
        after = await until(events, lambda name, _: name == "changes")
        assert [one["number"] for one in [*before, *after]] == list(range(1, len(before) + len(after) + 1))
        assert (after[0]["instance"], after[0]["state"]) == ("decode-0", "leaving")
        assert after[0]["why"] == "is leaving and takes no new requests: it was removed by the API"


async def test_reports_of_learners_come_when_they_are_new_and_at_the_beginning(service: Service) -> None:
    async with watching(service) as events:
        await until(events, lambda name, _: name == "snapshot")
        assert (await following(events))[0] == "snapshot"
        await service.client.put("/admin/v1/predictor", json=report(doing="training"))
        (shown,) = await until(events, lambda name, _: name == "learners")
        assert shown == report(doing="training") | {"age_s": shown["age_s"], "old": False}
        first = await until(events, lambda name, _: name == "snapshot")
        # Its age is in each snapshot; the report comes again only when there is a new one.
        name, second = await following(events)
        assert name == "snapshot"
        assert 0 < first["learner_ages_s"]["host-1"] <= second["learner_ages_s"]["host-1"]
        assert "learners" not in second
    async with watching(service) as late:
        (shown,) = await until(late, lambda name, _: name == "learners")
        assert shown["doing"] == "training"
        await service.client.put("/admin/v1/predictor", json=report(doing="trial"))
        (shown,) = await until(late, lambda name, _: name == "learners")
        assert shown["doing"] == "trial"


async def test_two_viewers_see_the_same_and_nothing_runs_without_viewers(service: Service) -> None:
    async with watching(service) as one, watching(service) as other:
        first = await until(one, lambda name, _: name == "snapshot")
        await until(other, lambda _, data: isinstance(data, dict) and data["now"] >= first["now"])
        assert any(task.get_name() == "status feed" for task in asyncio.all_tasks())
    await eventually(lambda: not any(task.get_name() == "status feed" for task in asyncio.all_tasks()))


async def test_a_fault_costs_an_event_and_not_the_feed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async with watching(service) as events:
        before = await until(events, lambda name, _: name == "snapshot")
        with monkeypatch.context() as patch:
            failed = asyncio.Event()

            def broken(_: Any) -> Any:
                failed.set()
                raise RuntimeError("for a test")

            patch.setattr(own_status, "snapshot", broken)
            await asyncio.wait_for(failed.wait(), 20)
        await until(events, lambda name, data: name == "snapshot" and data["now"] > before["now"])


async def test_the_feed_is_bounded(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [{"id": str(n), "resident_tokens": n, "remaining_p50": n / 3} for n in range(5)]
    monkeypatch.setattr(own_status, "snapshot", lambda _: {"requests": many})
    urls = ["http://127.0.0.1:9"]
    async with serving([], model_folder, Tuning(feed_requests=2), workers=urls) as service, watching(service) as events:
        shown = await until(events, lambda name, _: name == "snapshot")
    assert shown["requests"] == {"id": ["4", "3"], "resident_tokens": [4, 3], "remaining_p50": [1.3, 1.0]}
    assert shown["requests_total"] == 5


async def test_the_feed_needs_the_key_and_the_page_does_not(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder, QUICK, admin_key="secret") as service:
        assert (await service.client.get("/dashboard")).status_code == 200
        failure(await service.client.get("/admin/v1/events"), 401)
        failure(await service.client.get("/admin/v1/events", headers={"Authorization": "Bearer other"}), 401)
        async with watching(service, authorization="Bearer secret") as events:
            await until(events, lambda name, _: name == "snapshot")


async def test_a_gateway_that_stops_does_not_wait_for_those_who_watch(service: Service) -> None:
    """Through the server that `ares gateway` runs, whose patience is longer than this test's."""
    app = FastAPI()
    app.state.gateway = service.gateway
    app.state.feed = feed.Feed(service.models)
    app.include_router(feed.router)
    port = free_port()
    config = uvicorn.Config(DirectSend(app), port=port, log_config=None, lifespan="off", timeout_graceful_shutdown=300)
    server = Server(config, app)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
        client.stream("GET", "/admin/v1/events") as reply,
    ):
        lines = reply.aiter_lines()
        assert (await anext(lines)).startswith("event: ")
        server.should_exit = True
        await asyncio.wait_for(task, 30)
        assert [line async for line in lines][-1] == ""
