"""What instances report as sent, and does not come; and what is only slow."""

import asyncio
from types import SimpleNamespace

import pytest

from ares.gateway.control.predictions import rows_by_key
from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.delta import Delta
from ares.gateway.session.pending_call import PendingCall
from ares.gateway.session.phase import Phase
from ares.gateway.session.session import Session
from tests.gateway.running import (
    PROMPT,
    FakeCluster,
    Run,
    Start,
    hold,
    stop_holding,
    undisturbed,
)
from tests.waiting import eventually


async def test_telemetry_that_says_loading_costs_no_stream_that_runs(cluster: FakeCluster, start: Start) -> None:
    hold(cluster, 20)
    run = start(60, unmovable_reason="seed")
    await run.reached(10)
    run.session.supervise(1e6)
    stop_holding(cluster)
    assert await run.finish() == undisturbed(60)


async def test_silent_telemetry_alone_is_no_reason_to_stop_waiting() -> None:
    pending, instance = PendingCall(), SimpleNamespace(health=SimpleNamespace(frozen=True))
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def work() -> int:
        return await answer

    waiting = asyncio.create_task(pending.answer(instance, work()))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    pending.give_up_if_frozen()
    answer.set_result(7)
    assert await waiting == 7


async def looked_after(run: Run) -> None:
    """Look at the session as the gateway does, until it has ended."""
    since: dict[str, float] = {}
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(60):
        while not run.task.done():
            overdue = run.session.overdue(rows_by_key(run.cluster.pool.instances))
            since = {overdue: since.get(overdue, loop.time())} if overdue is not None else {}
            run.session.supervise(loop.time() - since[overdue] if overdue is not None else 0.0)
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("length", [40, 600])
async def test_a_stream_that_falls_silent_while_its_instance_works_on(
    cluster: FakeCluster, start: Start, length: int
) -> None:
    """Its connection was forgotten by the network; a short output is complete there before anybody misses it."""
    cluster.fakes["decode-0"].faults.mute_after = 10
    run = start(length, timeout_s=0.2)
    await run.reached(10)
    cluster.order = ["decode-1"]
    await looked_after(run)
    assert await run.finish() == undisturbed(length)
    await cluster.quiet()
    assert len(cluster.fakes["decode-1"].asked) == 1


async def test_a_prefill_that_is_never_answered(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["prefill-0"].faults.hang = True
    run = start(30, timeout_s=0.2)
    await looked_after(run)
    assert await run.finish() == undisturbed(30)


async def test_who_waits_for_an_instance_that_is_slow_goes_on_waiting(cluster: FakeCluster, start: Start) -> None:
    """It has generated nothing that is missing, and still has the request."""
    hold(cluster, 20)
    run = start(60, timeout_s=0.1)
    await run.reached(20)
    watching = asyncio.create_task(looked_after(run))
    await asyncio.sleep(0.6)
    stop_holding(cluster)
    await watching
    assert await run.finish() == undisturbed(60)
    assert not cluster.fakes["decode-1"].asked


async def test_a_client_that_does_not_read_is_not_taken_for_a_silent_instance(cluster: FakeCluster) -> None:
    gate = asyncio.Event()

    async def unread(batch: list[Delta]) -> bool:
        await gate.wait()
        return False

    session = Session("unread", PROMPT, Sampling({}, 300), cluster, 0.1)
    task = asyncio.create_task(session.run(unread))
    fake = cluster.fakes["decode-0"]
    await fake.until(lambda: bool(cluster.fakes["prefill-0"].asked))
    gate.set()
    await eventually(lambda: session.phase is Phase.DECODE)
    gate.clear()
    await fake.until(lambda: any(len(work.output) > 120 for work in fake.running.values()))
    await eventually(lambda: any(row.output > 120 for row in rows_by_key(cluster.pool.instances).values()))
    assert session.overdue(rows_by_key(cluster.pool.instances)) is None
    gate.set()
    await asyncio.wait_for(task, 60)
    assert session.emitted == undisturbed(300)
