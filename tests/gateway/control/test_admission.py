"""Admission to decode in a gateway: who waits, who goes first, and who gives way."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.instance import NoInstanceError
from ares.gateway.session.objectives import Objective
from ares.gateway.tuning import Tuning
from ares.policy import Cluster
from ares.policy.admission import AdmissionDecision, Candidates, Progress
from tests.gateway.gateways import (
    Client,
    cluster,
    finish,
    hold,
    sample,
    stop_holding,
    teach,
)
from tests.gateway.running import IMPATIENT
from tests.waiting import eventually


async def test_a_request_waits_until_it_fits_and_misses_nothing(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        teach(gateway, 400)
        hold(fakes, 100)
        clients = [Client(gateway, 400, name=f"r{n}", prompt=[10 + n] * 50) for n in range(3)]
        # 640 tokens hold one request of 450, and not two.
        await eventually(lambda: gateway.controller.waiting == 1 and [len(f.running) for f in fakes[1:]] == [1, 1], 30)
        waiting = next(client for client in clients if not client.tokens)
        stop_holding(fakes)
        await finish(clients, 400)
        assert waiting.tokens
        assert gateway.controller.waiting == 0
        assert sample(gateway, "ares_admission_decisions_total", kind="admit") == 3


async def test_whoever_was_refused_waits_for_room_like_everybody(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        teach(gateway, 400)
        hold(fakes, 100)
        large = Client(gateway, 400, name="large", prompt=[10] * 50)
        await eventually(lambda: any(fake.running for fake in fakes[1:]))
        full, refusing = sorted(fakes[1:], key=lambda fake: not fake.running)
        refusing.faults.refuse = 503
        second = Client(gateway, 400, name="second", prompt=[11] * 50)
        # 640 tokens hold one request of 450, and not two: it is not sent after the first one.
        await eventually(lambda: gateway.controller.waiting == 1)
        await asyncio.sleep(0.3)
        assert len(full.running) == 1
        assert len(second.tokens) == 1  # of its prefill
        refusing.faults.refuse = None
        stop_holding(fakes)
        await finish([large, second], 400)


async def test_nobody_waits_for_a_decision_about_nobody(model_folder: Path) -> None:
    async with cluster(model_folder, tuning=Tuning(admission_shortest_s=30.0)) as (gateway, _):
        for _ in range(3):  # as after the ends of others
            gateway.controller.wake_admission()
            await asyncio.sleep(0.02)
        client = Client(gateway, 20)
        await client.finish()
        client.check(20)


async def test_the_smallest_goes_first_unless_a_class_goes_before(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        teach(gateway, 550)
        hold(fakes, 60)
        running = [Client(gateway, 550, name=f"r{n}", prompt=[10 + n] * 50) for n in range(2)]
        await eventually(lambda: all(client.tokens for client in running), 30)
        order: list[str] = []

        def enter(name: str, prompt: int, rank: int) -> asyncio.Task[None]:
            async def emit(_: Any) -> bool:
                if name not in order:
                    order.append(name)
                return False

            work = gateway.generate(name, [7] * prompt, Sampling({}, 500), emit, Objective(rank=rank))
            return asyncio.create_task(work)

        waiting = [enter("large", 90, 0), enter("small", 20, 0), enter("background", 10, 1)]
        await eventually(lambda: gateway.controller.waiting == 3, 30)
        stop_holding(fakes)
        for client in running:
            await client.finish()
        await asyncio.wait_for(asyncio.gather(*waiting), 20)
        assert order.index("background") == 2
        assert set(order[:2]) == {"small", "large"}


async def test_a_long_request_gives_way_and_loses_no_token(model_folder: Path) -> None:
    async with cluster(model_folder, slo_ttft_s=1.0, slo_tpot_s=0.1) as (gateway, fakes):
        teach(gateway, 500)
        long = [Client(gateway, 500, name=f"long-{n}", prompt=[10 + n] * 100) for n in range(2)]
        await eventually(lambda: all(len(client.tokens) > 100 for client in long), 20)
        await eventually(lambda: all(i.state.step_time.coefficients is not None for i in gateway.pool.decode_instances))
        hold(fakes, 300)  # they stay, and hold the memory
        short = Client(gateway, 60, name="short", prompt=[3] * 300)
        await eventually(lambda: gateway.controller.suspended > 0 or short.task.done(), 20)
        assert len(gateway.backlog) >= gateway.controller.suspended
        stop_holding(fakes)
        for client, maximum in ((short, 60), (long[0], 500), (long[1], 500)):
            await client.finish()
            client.check(maximum)
        assert sample(gateway, "ares_admission_decisions_total", kind="suspend") >= 1
        assert sample(gateway, "ares_admission_decisions_total", kind="resume") >= 1


async def test_who_waits_long_still_fills_the_queue(model_folder: Path) -> None:
    async with cluster(model_folder, tuning=Tuning(pinned_kv_kept_s=0.1), maximum_waiting=2) as (gateway, fakes):
        teach(gateway, 400)
        hold(fakes, 100)
        clients = [Client(gateway, 400, name=f"r{n}", prompt=[10 + n] * 50) for n in range(4)]
        # Two decode; the others let their KV go, and wait as before: without a token, or a gap behind one.
        await eventually(lambda: len(fakes[0].released) == 2, 30)
        assert (len(gateway.backlog), gateway.controller.waiting, gateway.controller.suspended) == (2, 2, 0)
        assert sorted(len(client.tokens) for client in clients)[:2] == [0, 0]
        assert gateway.backlog.tokens >= 2 * 400
        with pytest.raises(NoInstanceError, match="2 requests wait already"):
            gateway.reserve(1)
        stop_holding(fakes)
        await finish(clients, 400)
        assert (len(gateway.backlog), gateway.backlog.tokens) == (0, 0)


async def test_what_does_not_fit_anywhere_is_refused_in_time(model_folder: Path) -> None:
    async with cluster(model_folder, maximum_wait_s=0.3) as (gateway, fakes):
        teach(gateway, 500)
        hold(fakes, 60)
        running = [Client(gateway, 500, name=f"r{n}", prompt=[10 + n] * 50) for n in range(2)]
        await eventually(lambda: all(client.tokens for client in running), 30)
        third = Client(gateway, 500, name="third", prompt=[3] * 50)
        with pytest.raises(NoInstanceError, match=r"no room for 0\.3 s"):
            await third.task
        stop_holding(fakes)
        await finish(running, 500)


async def test_who_is_held_does_not_enter_where_its_state_would_be_lost(model_folder: Path) -> None:
    async with cluster(model_folder, tuning=IMPATIENT) as (gateway, fakes):
        teach(gateway, 400)
        lacking, fit = fakes[1:]
        fit.carries = ("seed",)
        await fit.die()
        await fit.start()
        await eventually(lambda: any(i.state.hello and i.state.hello.carries for i in gateway.pool.instances))
        fit.hold_at = 100
        first = Client(gateway, 400, name="first", prompt=[10] * 50, needs=frozenset({"seed"}))
        await eventually(lambda: bool(fit.running))
        # There is room elsewhere, for others.
        second = Client(gateway, 400, name="second", prompt=[11] * 50, needs=frozenset({"seed"}))
        await eventually(lambda: gateway.controller.waiting == 1)
        other = Client(gateway, 60, name="other", prompt=[12] * 50)
        await other.finish()
        other.check(60)
        assert gateway.controller.waiting == 1
        fit.hold_at = None
        await finish([first, second], 400)
        assert len(lacking.asked) == 1


async def test_an_entrance_that_throws_lets_everybody_in(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, _):

        def broken(cluster: Cluster, candidates: Candidates, running: Progress) -> list[AdmissionDecision]:
            raise RuntimeError("a bug in the policy")

        gateway.controller.admission_decider.policy.decide = broken  # type: ignore[method-assign]
        client = Client(gateway)
        await client.finish()
        client.check()
        assert sample(gateway, "ares_controller_faults_total", part="admission") >= 1


async def test_switching_to_open_admission_lets_those_in_who_wait(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        teach(gateway, 500)
        hold(fakes, 60)
        clients = [Client(gateway, 500, name=f"r{n}", prompt=[10 + n] * 50) for n in range(3)]
        await eventually(lambda: gateway.controller.waiting == 1, 30)
        gateway.controller.use_preset("static-rr")
        await eventually(lambda: gateway.controller.waiting == 0, 30)
        stop_holding(fakes)
        await finish(clients, 500)
