"""While no instance is ready for a moment, requests wait; how long, how many, and when they do not."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ares.gateway.tuning import Tuning
from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.http.service import Service, failure, serving
from tests.gateway.running import IMPATIENT, VOCABULARY
from tests.waiting import eventually


async def without_decode(service: Service, fakes: list[FakeInstance]) -> None:
    """Let the decode instances die, one way or the other."""
    await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
    for fake in fakes[1:]:
        await fake.die()
    await eventually(lambda: not service.gateway.pool.ready, 15)


@pytest.mark.parametrize("preset", ["off", "ares"])
async def test_requests_wait_for_an_instance_that_restarts(
    fakes: list[FakeInstance], model_folder: Path, preset: str
) -> None:
    async with serving(fakes, model_folder, tuning=IMPATIENT, preset=preset) as service:
        await without_decode(service, fakes)
        replies = [
            asyncio.create_task(ask(max_tokens=5, stream=stream))
            for ask in (service.complete, service.chat)
            for stream in (False, True)
        ]
        await eventually(lambda: len(service.gateway.backlog) == 4, 15)
        await asyncio.sleep(1.0)
        assert not any(reply.done() for reply in replies)
        assert "decode-0 is lost" in failure(await service.client.get("/ready"), 503)["message"]
        # What is wrong is refused all the same.
        failure(await service.complete(model="other"), 404)
        failure(await service.complete(prompt=""), 400)
        await fakes[1].start()
        assert [(await reply).status_code for reply in replies] == [200] * 4
        assert (len(service.gateway.backlog), service.gateway.backlog.tokens) == (0, 0)


async def test_requests_wait_while_one_drains_and_the_other_is_silent(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    async with serving(fakes, model_folder, tuning=IMPATIENT) as service:
        await eventually(lambda: all(i.open for i in service.gateway.pool.instances), 15)
        await service.client.post("/admin/v1/instances/decode-0/drain", json={})
        await fakes[2].die()
        await eventually(lambda: not service.gateway.pool.ready, 15)
        waiting = asyncio.create_task(service.complete())
        await eventually(lambda: len(service.gateway.backlog) == 1, 15)
        await service.client.post("/admin/v1/instances/decode-0/undrain")
        assert (await waiting).status_code == 200


async def test_not_for_longer_than_they_may(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder, tuning=IMPATIENT, maximum_wait_s=1.0) as service:
        await without_decode(service, fakes)
        for stream in (False, True):
            begun = time.monotonic()
            reply = await service.complete(stream=stream)
            error = failure(reply, 503)
            assert error["message"] == "no decode instance is ready, for 1 s; GET /ready shows why"
            assert error["code"] == "no_instance_ready"
            assert int(reply.headers["retry-after"]) >= 1
            assert 0.9 < time.monotonic() - begun < 8.0
        assert len(service.gateway.backlog) == 0


async def test_who_waits_fills_the_queue_and_leaves_it(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder, tuning=IMPATIENT, maximum_waiting=2, maximum_wait_s=30.0) as service:
        await without_decode(service, fakes)
        waiting = [asyncio.create_task(service.complete()) for _ in range(2)]
        await eventually(lambda: len(service.gateway.backlog) == 2, 15)
        assert "2 requests wait already" in failure(await service.complete(), 503)["message"]
        waiting[0].cancel()  # as a client leaves
        await eventually(lambda: len(service.gateway.backlog) == 1, 15)
        await fakes[1].start()
        assert (await waiting[1]).status_code == 200


async def test_the_tokens_of_who_waits_count_by_the_memory_that_was_there(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    async with serving(fakes, model_folder, tuning=IMPATIENT) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        limit = service.gateway.maximum_waiting_tokens
        await without_decode(service, fakes)
        assert service.gateway.maximum_waiting_tokens == limit
        waiting = asyncio.create_task(service.complete(prompt=[10] * 300))
        await eventually(lambda: service.gateway.backlog.tokens == 300, 15)
        await fakes[1].start()
        assert (await waiting).status_code == 200


async def test_nobody_waits_for_one_that_has_never_been_ready(model_folder: Path) -> None:
    async with serving([FakeInstance("absent", "both")], model_folder, Tuning(first_report_s=1.0)) as service:
        begun = time.monotonic()
        message = failure(await service.complete(), 503)["message"]
        assert message == "no decode instance is ready; GET /ready shows why"
        assert time.monotonic() - begun < 8.0
        # After the first seconds of the gateway, not at all.
        await asyncio.sleep(max(0.0, begun + 1.5 - time.monotonic()))
        begun = time.monotonic()
        failure(await service.complete(), 503)
        assert time.monotonic() - begun < 1.0


async def test_a_gateway_that_has_just_started_hears_of_its_instances_first(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    async with serving(fakes, model_folder) as service:
        assert (await service.complete()).status_code == 200


async def test_nobody_waits_for_one_that_comes_back_as_another(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder, replace(IMPATIENT, first_report_s=0.0)) as service:
        await without_decode(service, fakes)
        waiting = asyncio.create_task(service.complete())
        await eventually(lambda: len(service.gateway.backlog) == 1, 15)
        for fake in fakes[1:]:
            fake.models = ["other-model"]
            await fake.start()
        assert "GET /ready shows why" in failure(await waiting, 503)["message"]
        assert "other-model" in failure(await service.client.get("/ready"), 503)["message"]


@pytest.mark.parametrize("preset", ["off", "ares"])
async def test_a_running_request_waits_for_its_only_instance(model_folder: Path, preset: str) -> None:
    async with (
        instances("prefill", "decode", vocabulary=VOCABULARY) as fakes,
        serving(fakes, model_folder, tuning=IMPATIENT, preset=preset) as service,
    ):
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        fakes[1].hold_at = 12
        running = asyncio.create_task(service.complete(stream=True))
        await eventually(lambda: any(len(s.emitted) > 5 for s in service.gateway.sessions.values()), 15)
        await fakes[1].die()
        await asyncio.sleep(1.2)  # longer than one that was only blamed needs
        fakes[1].hold_at = None
        await fakes[1].start()
        text = (await running).text
        assert "error" not in text
        assert '"finish_reason":"length"' in text


@pytest.mark.parametrize("preset", ["off", "ares"])
async def test_the_first_to_find_an_instance_dead_waits_as_the_others(model_folder: Path, preset: str) -> None:
    async with (
        instances("prefill", "decode", vocabulary=VOCABULARY) as fakes,
        serving(fakes, model_folder, Tuning(recovery_s=0.5), preset=preset) as service,
    ):
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        await fakes[1].die()
        assert service.gateway.pool.ready, "nobody has noticed yet"
        first = asyncio.create_task(service.complete())
        await asyncio.sleep(1.2)
        await fakes[1].start()
        assert (await first).status_code == 200
