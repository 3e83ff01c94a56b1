"""The instance of a request fails while it decodes or hands it over: every token still comes once."""

import asyncio
from typing import Any

import pytest

from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.delta import Delta, EngineLostError, EngineRefusedError
from ares.gateway.session.session import Session
from tests.gateway.running import (
    PROMPT,
    FakeCluster,
    Start,
    move_once,
    undisturbed,
)
from tests.waiting import eventually


async def test_a_source_that_dies_while_it_decodes(cluster: FakeCluster, start: Start) -> None:
    run = start(100)
    await run.reached(10)
    await cluster.fakes["decode-0"].die()
    assert await run.finish() == undisturbed(100)
    assert run.where.name == "decode-1"
    await cluster.quiet()


async def test_a_stream_that_breaks_on_a_living_instance(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-0"].faults.break_after = 10
    run = start(60)
    assert await run.finish() == undisturbed(60)
    await cluster.quiet()


@pytest.mark.parametrize(("most", "survives"), [(2, False), (20, True)])
async def test_it_survives_so_many_losses(cluster: FakeCluster, start: Start, most: int, survives: bool) -> None:
    decoding = [fake for fake in cluster.fakes.values() if fake.role == "decode"]
    for fake in decoding:
        fake.faults.break_after = 10  # 60 tokens: half a dozen losses
    run = start(60, maximum_attempts=most)
    if survives:
        assert await run.finish() == undisturbed(60)
    else:
        with pytest.raises(EngineLostError):
            await run.finish()
        assert sum(len(fake.asked) for fake in decoding) == 1 + most
        assert run.tokens == undisturbed(60)[: len(run.tokens)]
    await cluster.quiet()


async def test_an_instance_that_aborts_what_it_runs(cluster: FakeCluster, start: Start) -> None:
    run = start(100)
    await run.reached(10)
    cluster.fakes["decode-0"].faults.abort = True
    await run.reached(20)
    assert await run.finish() == undisturbed(100)


async def test_an_engine_error_in_the_stream(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-0"].faults.error_in_stream = 500
    run = start(40)
    assert await run.finish() == undisturbed(40)


async def test_a_request_that_the_engine_refuses_in_its_stream(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-0"].faults.error_in_stream = 400
    run = start(40)
    with pytest.raises(EngineRefusedError):
        await run.finish()
    await cluster.quiet()


@pytest.mark.parametrize("parameters", [{}, {"logprobs": 0}], ids=["plain", "logprobs"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_source_that_breaks_off_after_the_cut(
    cluster: FakeCluster, start: Start, when: str, parameters: dict[str, Any]
) -> None:
    """Before or after the target has taken over: each token once, one owner, nothing left behind."""
    source, target = cluster.fakes["decode-0"], cluster.fakes["decode-1"]
    source.faults.break_at_cut = True
    if when == "after":
        source.faults.tail_after_s = 0.2
    else:
        target.faults.answer_after_s = 0.2
    run = start(150, **parameters)
    await run.reached(10)
    record = await run.move("decode-1")
    assert record.outcome in {"moved", "returned"}
    if when == "after" and not parameters:
        assert record.outcome == "moved"
    assert await run.finish() == undisturbed(150)
    await cluster.quiet()
    if parameters:
        content = [p.token_id for delta in run.deltas if delta.logprobs for p in delta.logprobs.content or []]
        assert content == undisturbed(150)


async def test_a_source_that_breaks_off_with_more_than_a_handover_repeats(cluster: FakeCluster) -> None:
    """The client reads slowly: of the tokens in flight only the last are known when the stream breaks."""
    source = cluster.fakes["decode-0"]
    source.faults.break_at_cut = True
    gate, tokens = asyncio.Event(), list[int]()

    async def slow(batch: list[Delta]) -> bool:
        if len(tokens) > 5:
            await gate.wait()
        tokens.extend(token for delta in batch for token in delta.token_ids or [])
        return False

    session = Session("slow", PROMPT, Sampling({}, 250), cluster, 2.0)
    task = asyncio.create_task(session.run(slow))
    await source.until(lambda: any(len(work.output) > 120 for work in source.running.values()))
    move = asyncio.create_task(session.hand_over(cluster.instance("decode-1"), "test"))
    await source.until(lambda: bool(source.pinned))
    await asyncio.sleep(0.05)  # the reset arrives while the client blocks
    gate.set()
    assert (await asyncio.wait_for(move, 60)).outcome in {"moved", "returned"}
    await asyncio.wait_for(task, 60)
    assert tokens == undisturbed(250)
    await cluster.quiet()


async def test_a_source_and_a_target_that_both_fail(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-0"].faults.break_at_cut = True
    cluster.fakes["decode-1"].faults.refuse = 500
    await move_once(cluster, start, 100, "returned")


async def test_a_source_that_is_preempted_or_waits(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-0"].faults.not_running = True
    run = start(60)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "not_running"
    assert run.session.unmovable_now() in {None, "finished"}
    assert await run.finish() == undisturbed(60)
    assert cluster.fakes["decode-1"].asked == []


async def test_a_lost_handover(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-0"].faults.lose_handover = True
    await move_once(cluster, start, 100, "source_silent", "returned", timeout_s=0.3)


async def test_a_handover_after_the_timeout(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-0"].faults.handover_after_s = 0.5
    await move_once(cluster, start, 100, "source_silent", timeout_s=0.2)


async def test_a_source_that_does_not_hear_the_cut(cluster: FakeCluster, start: Start) -> None:
    source = cluster.fakes["decode-0"]
    source.faults.deaf = True
    run = start(200, timeout_s=0.1)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "source_silent"
    source.faults.deaf = False  # it hears the cut now, when nobody waits for its answer
    assert await run.finish() == undisturbed(200)
    await cluster.quiet()


async def test_a_cut_without_a_taker_does_not_blame_the_instance(cluster: FakeCluster, start: Start) -> None:
    """A late cut on the only living decode instance must not leave the request without one."""
    source = cluster.fakes["decode-0"]
    run = start(200, timeout_s=0.1)
    await run.reached(10)
    source.faults.deaf = True
    assert (await run.move("decode-1")).outcome == "source_silent"
    await cluster.fakes["decode-1"].die()
    await eventually(lambda: not cluster.instance("decode-1").health.healthy)
    source.faults.deaf = False
    assert await run.finish() == undisturbed(200)
