"""Service classes, bounds on what waits, and the preset, over a real server."""

import asyncio
import math
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from ares.config import GatewayConfig
from ares.gateway.http import app as application
from ares.gateway.service import Gateway
from ares.gateway.session.phase import Phase
from tests.gateway.fakes import FakeInstance
from tests.gateway.gateways import stop_holding
from tests.gateway.http.service import MODEL, PROMPT, Service, failure, serving
from tests.waiting import eventually


async def test_a_class_is_named_in_a_header_and_must_exist(fakes: list[FakeInstance], model_folder: Path) -> None:
    classes = {"batch": {"ttft_s": 60, "rank": 1, "gap_s": "none"}}
    async with serving(fakes, model_folder, classes=classes, slo_ttft_s=2.0) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        body = {"prompt": PROMPT, "max_tokens": 5, "priority": 3}
        reply = await service.client.post("/v1/completions", json=body, headers={"x-ares-class": "batch"})
        assert reply.status_code == 200
        batch, usual = service.gateway.objective("batch", 3), service.gateway.objective(None, 0)
        assert (batch.ttft_s, batch.tpot_s, batch.rank) == (60, None, 4)
        assert (usual.ttft_s, usual.rank) == (2.0, 0)
        assert (batch.gap_s, usual.gap_s) == (math.inf, 2.0)
        metrics = (await service.client.get("/metrics")).text
        assert 'ares_longest_gap_seconds_count{service_class="batch"} 1.0' in metrics
        reply = await service.client.post("/v1/completions", json=body, headers={"x-ares-class": "gold"})
        assert "no class 'gold'; configured: batch" in failure(reply, 400)["message"]


async def test_a_full_queue_is_refused_with_when_to_try_again(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder, maximum_waiting=2) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        fakes[0].faults.answer_after_s = 1.0
        waiting = [asyncio.create_task(service.complete()) for _ in range(2)]
        await eventually(lambda: len(service.gateway.backlog) == 2)
        reply = await service.complete()
        assert "2 requests wait already" in failure(reply, 503)["message"]
        assert reply.headers["retry-after"] == "1"
        assert [(await one).status_code for one in waiting] == [200, 200]
        fakes[0].faults.answer_after_s = 0.0
        assert (await service.complete()).status_code == 200


async def test_all_sequences_of_a_request_have_to_fit_into_the_queue(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    async with serving(fakes, model_folder, maximum_waiting=5) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        fakes[0].faults.answer_after_s = 1.0
        waiting = [asyncio.create_task(service.complete()) for _ in range(3)]
        await eventually(lambda: len(service.gateway.backlog) == 3)
        for body in ({"n": 3}, {"prompt": [PROMPT] * 3}, {"n": 5, "stream": True}):
            refused = failure(await service.complete(**body), 503)
            assert "3 requests wait already, and " in refused["message"]
        assert "at most 5 may wait here" in failure(await service.complete(n=6), 400)["message"]
        assert len(service.gateway.backlog) == 3
        waiting.append(asyncio.create_task(service.complete(n=2)))
        await eventually(lambda: len(service.gateway.backlog) == 5)
        assert "5 requests wait already" in failure(await service.complete(), 503)["message"]
        assert [(await one).status_code for one in waiting] == [200] * 4
        assert (len(service.gateway.backlog), service.gateway.backlog.tokens) == (0, 0)


async def test_what_is_being_tokenised_fills_the_queue(
    fakes: list[FakeInstance], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(fakes, model_folder, maximum_waiting=2) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        text, go = service.gateway.text, threading.Event()
        encode = text.encode

        def late(given: str, **options: Any) -> list[int]:
            go.wait(10)
            return encode(given, **options)

        monkeypatch.setattr(text, "encode", late)
        # Both bodies are large; the first prompt has more tokens than the model takes.
        stop = ["b" * 30_000]
        coming = [asyncio.create_task(service.complete(prompt=p, stop=stop)) for p in ("a" * 30_000, "a")]
        await eventually(lambda: len(service.gateway.backlog) == 2)
        more = await asyncio.gather(*(service.complete(prompt="a", stop=stop) for _ in range(10)))
        assert {failure(reply, 503)["message"] for reply in more} == {"2 requests wait already"}
        go.set()
        assert [(await one).status_code for one in coming] == [400, 200]
        assert (len(service.gateway.backlog), service.gateway.backlog.tokens) == (0, 0)


@pytest.mark.parametrize(
    ("limit", "taken"), [({"maximum_waiting": 2}, 2), ({"maximum_waiting_tokens": 300}, 3)], ids=["number", "tokens"]
)
async def test_who_comes_at_once_does_not_slip_in(
    fakes: list[FakeInstance], model_folder: Path, limit: dict[str, int], taken: int
) -> None:
    fakes[0].faults.hang = True
    app = application.build(
        GatewayConfig(model=MODEL, preset="off", workers=[f.url for f in fakes], **limit),  # type: ignore[arg-type]
        model_folder,
    )
    gateway: Gateway = app.state.gateway
    async with app.router.lifespan_context(app):
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in gateway.pool.instances), 15)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            body = {"prompt": [10] * 100, "max_tokens": 1, "stream": True}
            # Turn by turn they do the same: all have asked before the first is noted.
            tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(20)]
            await eventually(lambda: sum(task.done() for task in tasks) + len(gateway.backlog) == 20)
            refused = [task.result().status_code for task in tasks if task.done()]
            waiting, begun = len(gateway.backlog), [*gateway.sessions]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert (refused, waiting, len(begun)) == ([503] * (20 - taken), taken, taken)
        assert (len(gateway.backlog), gateway.backlog.tokens) == (0, 0)


@pytest.mark.parametrize("preset", ["off", "ares-rebalance"])
async def test_who_waits_in_an_engine_fills_the_queue(
    fakes: list[FakeInstance], model_folder: Path, preset: str
) -> None:
    async with serving(fakes, model_folder, maximum_waiting=2, preset=preset) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        for fake in fakes[1:]:
            fake.faults.silent_stream = True
        waiting = [asyncio.create_task(service.complete()) for _ in range(2)]
        await eventually(lambda: [s.phase for s in service.gateway.sessions.values()] == [Phase.DECODE] * 2)
        assert "2 requests wait already" in failure(await service.complete(), 503)["message"]
        for fake in fakes[1:]:
            fake.faults.silent_stream = False
            fake.hold_at = 10
        # Now they have tokens: there is room in the queue.
        await eventually(lambda: len(service.gateway.backlog) == 0)
        more = asyncio.create_task(service.complete())
        await eventually(lambda: len(service.gateway.sessions) == 3)
        stop_holding(fakes)
        assert [(await one).status_code for one in (*waiting, more)] == [200] * 3
        assert (len(service.gateway.backlog), service.gateway.backlog.tokens) == (0, 0)


async def test_a_queue_is_full_by_the_tokens_that_it_will_take_too(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    async with serving(fakes, model_folder, maximum_waiting_tokens=1200) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        fakes[0].faults.hang = True
        # 400 tokens each: 300 of the prompt, and a limit of 100 that lies below what outputs usually have.
        waiting = [asyncio.create_task(service.complete(prompt=[10] * 300, max_tokens=100)) for _ in range(3)]
        # Until its session waits, a request counts with its prompt alone.
        await eventually(lambda: service.gateway.backlog.tokens == 1200)
        assert len(service.gateway.backlog) == 3
        reply = await service.complete()
        assert "3 requests of 1200 tokens wait already" in failure(reply, 503)["message"]
        assert int(reply.headers["retry-after"]) >= 1
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await eventually(lambda: len(service.gateway.backlog) == 0)
        fakes[0].faults.hang = False
        assert (await service.complete()).status_code == 200
        assert service.gateway.backlog.tokens == 0


async def test_a_request_of_many_prompts_does_not_overfill_a_queue(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    async with serving(fakes, model_folder, maximum_waiting_tokens=1000) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        fakes[0].faults.hang = True
        many = {"prompt": [[10] * 200] * 3, "n": 2}
        # Nobody waits: it is taken, although it is larger than the limit by itself.
        waiting = [asyncio.create_task(service.complete(**many))]
        await eventually(lambda: len(service.gateway.sessions) == 6)
        waiting[0].cancel()
        await eventually(lambda: len(service.gateway.backlog) == 0)
        waiting.append(asyncio.create_task(service.complete(prompt=[10] * 100, max_tokens=1)))
        await eventually(lambda: len(service.gateway.sessions) == 1)
        held = service.gateway.backlog.tokens
        message = failure(await service.complete(**many), 503)["message"]
        assert message == f"1 requests of {held} tokens wait already, and 1200 would come"
        waiting[1].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await eventually(lambda: len(service.gateway.backlog) == 0)
        assert service.gateway.backlog.tokens == 0


async def test_a_queue_is_as_long_as_the_memory_of_the_pool_is_large(shared: Service) -> None:
    held = sum(i.state.capacity_tokens for i in shared.gateway.pool.decode_instances)
    assert held == 2 * 1000 * 16
    assert shared.gateway.maximum_waiting_tokens == 16 * held


async def test_the_preset_is_switched_while_serving(service: Service) -> None:
    reply = await service.client.put("/admin/v1/preset", json={"preset": "ares"})
    assert reply.json() == {"preset": "ares"}
    assert (await service.complete()).status_code == 200
    assert (await service.client.get("/admin/v1/status")).json()["preset"] == "ares"
    reply = await service.client.put("/admin/v1/preset", json={"preset": "ares-oracle"})
    assert "true lengths" in failure(reply, 400)["message"]
    assert failure(await service.client.put("/admin/v1/preset", json={}), 400)["param"] == "preset"
