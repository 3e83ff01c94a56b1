"""The orderly end of a gateway: what it still answers, what it finishes, and what it says to those it does not."""

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from ares.gateway.http import app as application
from ares.gateway.http.responses import DirectSend
from ares.gateway.http.server import Server
from ares.gateway.shutdown import Shutdown, ShuttingDownError
from tests.gateway.fakes import FakeInstance, expected, free_port
from tests.gateway.gateways import configuration, hold, stop_holding
from tests.gateway.http.service import Service, failure
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually

PROMPT = [10, 20, 30, 40, 50]


# --- what runs ---


async def test_what_ends_in_time_is_left_alone() -> None:
    shutdown, go, done = Shutdown(), asyncio.Event(), []

    async def work() -> None:
        await go.wait()
        done.append(True)

    shutdown.check()
    running = asyncio.create_task(shutdown.run(work()))
    await asyncio.sleep(0)
    draining = asyncio.create_task(shutdown.drain(60.0, lambda: False))
    await eventually(lambda: shutdown.begun)
    with pytest.raises(ShuttingDownError, match="takes no new requests"):
        shutdown.check()
    assert not draining.done()
    go.set()
    await asyncio.wait_for(draining, 60)
    await running
    assert done == [True]


@pytest.mark.parametrize("at_once", [True, False])
async def test_what_does_not_is_ended_and_told_why(at_once: bool) -> None:
    shutdown, cleaned = Shutdown(), []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    running = [asyncio.create_task(shutdown.run(work())) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.wait_for(shutdown.drain(600.0 if at_once else 0.05, lambda: at_once), 60)
    assert cleaned == [True] * 3
    for task in running:
        with pytest.raises(ShuttingDownError, match="before the output was complete"):
            await task
    # And what slipped in meanwhile.
    with pytest.raises(ShuttingDownError):
        await shutdown.run(work())


async def test_a_timeout_of_the_work_itself_stays_what_it_is() -> None:
    async def work() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await Shutdown().run(work())


async def test_a_client_that_leaves_cancels_its_work() -> None:
    shutdown = Shutdown()
    running = asyncio.create_task(shutdown.run(asyncio.Event().wait()))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.wait_for(shutdown.drain(60.0, lambda: False), 60)


# --- the service ---


@contextlib.asynccontextmanager
async def serving(fakes: list[FakeInstance], folder: Path, **settings: Any) -> AsyncIterator[tuple[Server, Service]]:
    """Run the server of `ares gateway`; signals come by `handle_exit`."""
    app = application.build(configuration(fakes, **settings), folder)
    port = free_port()
    server = Server(uvicorn.Config(DirectSend(app), port=port, log_config=None, timeout_graceful_shutdown=5), app)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        service = Service(app.state.models, client, fakes, port)
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances))
        yield server, service
    server.should_exit = server.force_exit = True
    await asyncio.wait_for(task, 20)


async def lines(service: Service, count: int, started: asyncio.Event) -> list[dict[str, Any]]:
    """The events of a stream of so many tokens."""
    body = {"prompt": PROMPT, "max_tokens": count, "stream": True, "return_token_ids": True}
    async with service.client.stream("POST", "/v1/completions", json=body) as reply:
        found = []
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line.removeprefix("data: ")))
                started.set()
        return found


async def test_running_streams_finish_and_nothing_new_is_taken(fakes: list[FakeInstance], model_folder: Path) -> None:
    hold(fakes, 30)
    async with serving(fakes, model_folder) as (server, service):
        started = asyncio.Event()
        stream = asyncio.create_task(lines(service, 100, started))
        await started.wait()
        server.handle_exit(signal.SIGTERM, None)
        await eventually(lambda: service.gateway.shutdown.begun)
        assert "shutting down" in failure(await service.client.get("/ready"), 503)["message"]
        assert (await service.client.get("/health")).status_code == 200
        refused = await service.complete()
        assert "takes no new requests" in failure(refused, 503)["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert not stream.done()
        stop_holding(fakes)
        tokens = [token for event in await stream for token in event["choices"][0]["token_ids"]]
        assert tokens == expected(PROMPT, 100, vocabulary=VOCABULARY)
        await eventually(lambda: not server.servers[0].is_serving())
        await service.quiet()


@pytest.mark.parametrize("signals", [1, 2])
async def test_what_is_left_ends_with_an_error_and_frees_its_engines(
    signals: int, fakes: list[FakeInstance], model_folder: Path
) -> None:
    """At the deadline, or at the second signal."""
    hold(fakes, 30)
    patience = {"shutdown_timeout_s": 0.3 if signals == 1 else 600.0}
    async with serving(fakes, model_folder, **patience) as (server, service):
        started = asyncio.Event()
        stream = asyncio.create_task(lines(service, 100, started))
        whole = asyncio.create_task(service.complete(max_tokens=100))
        await started.wait()
        await eventually(lambda: sum(len(fake.running) for fake in fakes[1:]) == 2)
        for _ in range(signals):
            server.handle_exit(signal.SIGTERM, None)
        *_, last = await stream
        assert last["error"]["type"] == "service_unavailable_error"
        assert "before the output was complete" in last["error"]["message"]
        assert "before the output was complete" in failure(await whole, 503)["message"]
        await service.quiet()
        assert sum(len(fake.aborted) for fake in fakes[1:]) == 2


async def test_held_requests_are_told_too(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder, preset="ares", shutdown_timeout_s=0.1) as (server, service):
        service.gateway.controller.admission_decider.policy.decide = lambda *_: []  # type: ignore[method-assign]
        waiting = asyncio.create_task(service.complete())
        await eventually(lambda: service.gateway.controller.waiting == 1 and len(fakes[0].pinned) == 1)
        server.handle_exit(signal.SIGTERM, None)
        assert "before the output was complete" in failure(await waiting, 503)["message"]
        await service.quiet()
