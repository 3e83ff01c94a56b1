"""The target of a move refuses, hangs or dies: the request goes on at its source."""

import asyncio

import pytest

from tests.gateway.running import (
    FakeCluster,
    Run,
    Start,
    move_once,
    undisturbed,
)
from tests.waiting import eventually


async def goes_on_at_the_source(cluster: FakeCluster, run: Run, outcome: str = "returned") -> None:
    record = await run.move("decode-1")
    assert record.outcome == outcome
    await run.reached(len(run.tokens) + 1)
    assert run.where.name == "decode-0"
    maximum = run.session.sampling.maximum_tokens
    assert await run.finish() == undisturbed(maximum)
    await cluster.quiet()


@pytest.mark.parametrize("status", [400, 429, 500, 503])
async def test_a_target_that_refuses(cluster: FakeCluster, start: Start, status: int) -> None:
    cluster.fakes["decode-1"].faults.refuse = status
    run = start(150)
    await run.reached(10)
    await goes_on_at_the_source(cluster, run)


async def test_a_target_that_is_dead(cluster: FakeCluster, start: Start) -> None:
    run = start(150)
    await run.reached(10)
    await cluster.fakes["decode-1"].die()
    await goes_on_at_the_source(cluster, run)


async def test_a_target_that_hangs_before_it_answers(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-1"].faults.hang = True
    run = start(600, timeout_s=0.3)
    await run.reached(10)
    began = asyncio.get_running_loop().time()
    await goes_on_at_the_source(cluster, run)
    assert asyncio.get_running_loop().time() - began < 4


async def test_a_target_that_hangs_stalls_the_client_for_one_timeout(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-1"].faults.hang = True
    run = start(600, timeout_s=1.0)
    await run.reached(10)
    move = asyncio.create_task(run.move("decode-1"))
    source = cluster.fakes["decode-0"]
    await source.until(lambda: bool(source.pinned))
    began = asyncio.get_running_loop().time()
    await run.reached(len(run.tokens) + 3)
    assert asyncio.get_running_loop().time() - began < 1.9
    assert (await move).outcome == "returned"


async def test_a_target_that_never_sends_a_token(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-1"].faults.silent_stream = True
    run = start(150, timeout_s=0.3)
    await run.reached(10)
    await goes_on_at_the_source(cluster, run)
    assert len(cluster.fakes["decode-1"].aborted) == 1


async def test_a_target_that_dies_before_its_first_token(cluster: FakeCluster, start: Start) -> None:
    target = cluster.fakes["decode-1"]
    target.faults.silent_stream = True
    run = start(150, timeout_s=5)
    await run.reached(10)
    move = asyncio.create_task(run.move("decode-1"))
    await target.until(lambda: bool(target.pulled))
    await target.die()
    assert (await move).outcome == "returned"
    assert await run.finish() == undisturbed(150)
    await cluster.quiet()


async def test_a_target_that_fails_the_request_in_its_stream(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-1"].faults.error_in_stream = 500
    await move_once(cluster, start, 100, "moved", "returned")  # the error may come with the first token


async def test_more_failed_moves_than_a_request_has_attempts(cluster: FakeCluster, start: Start) -> None:
    """A policy that insists on a bad target costs moves, never the request."""
    cluster.fakes["decode-1"].faults.refuse = 503
    run = start(600)
    for count in range(6):
        await run.reached(10 * (count + 1))
        await eventually(lambda: run.session.unmovable_now() is None)
        assert (await run.move("decode-1")).outcome == "returned"
    assert await run.finish() == undisturbed(600)


async def test_failed_moves_leave_no_trace_in_the_target(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-1"].faults.silent_stream = True
    run = start(150, timeout_s=0.2)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "returned"
    await run.finish()
    assert cluster.instance("decode-1").control.waiting_for == 0
    assert cluster.instance("decode-0").control.waiting_for == 0
