"""Prefill and decode instances that are missing, refuse, or end: the request goes on, or says why it cannot."""

import pytest

from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.delta import EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import NoInstanceError
from tests.gateway.fakes import instances
from tests.gateway.running import (
    IMPATIENT,
    PROMPT,
    VOCABULARY,
    FakeCluster,
    Run,
    Start,
    start_pool,
    undisturbed,
)
from tests.waiting import eventually


async def test_a_prefill_instance_that_dies_is_done_without(cluster: FakeCluster, start: Start) -> None:
    await cluster.fakes["prefill-0"].die()
    run = start(30)
    assert await run.finish() == undisturbed(30)


async def test_a_prefill_connection_that_breaks_leaves_nothing_pinned(cluster: FakeCluster, start: Start) -> None:
    """The instance lives on: it must learn that nobody wants this prompt."""
    prefill = cluster.fakes["prefill-0"]
    prefill.faults.silent_stream = True
    run = start(30)
    await prefill.until(lambda: bool(prefill.running))
    key = next(iter(prefill.running))
    prefill.reset_connections()
    prefill.faults.silent_stream = False
    assert await run.finish() == undisturbed(30)
    await prefill.until(lambda: key in prefill.released)
    await cluster.quiet()


@pytest.mark.parametrize("status", [500, 503])
async def test_an_instance_that_fails_at_the_door_is_not_the_last_word(
    cluster: FakeCluster, start: Start, status: int
) -> None:
    cluster.fakes["prefill-0"].faults.refuse = status
    cluster.fakes["decode-0"].faults.refuse = status
    run = start(30)
    assert await run.finish() == undisturbed(30)
    await cluster.quiet()


async def test_a_request_that_the_engine_refuses(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-0"].faults.refuse = 400
    run = start(30)
    with pytest.raises(EngineRefusedError, match="decode-0 refuses"):
        await run.finish()
    await cluster.quiet()


async def test_no_decode_instance(cluster: FakeCluster, start: Start) -> None:
    cluster.order = []
    run = start(30)
    with pytest.raises(NoInstanceError):
        await run.finish()
    await cluster.quiet()


async def test_all_decode_instances_die(cluster: FakeCluster, start: Start) -> None:
    run = start(300)
    await run.reached(5)
    await cluster.fakes["decode-1"].die()
    await cluster.fakes["decode-0"].die()
    with pytest.raises((EngineLostError, NoInstanceError)):
        await run.finish()


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"break_after": 2}, "lost 4 times, the last time: the stream broke"),
        ({"refuse": 503}, "2 instances in turn did not take the request, the last one: decode-1"),
    ],
    ids=["lost again and again", "refused by all"],
)
async def test_what_every_instance_fails_says_how_often_and_why(
    cluster: FakeCluster, start: Start, faults: dict[str, int], message: str
) -> None:
    for name in cluster.order:
        for fault, value in faults.items():
            setattr(cluster.fakes[name].faults, fault, value)
    run = start(60)
    with pytest.raises(EngineLostError, match=message):
        await run.finish()
    assert run.tokens == undisturbed(60)[: len(run.tokens)]
    await cluster.quiet()


async def test_a_long_request_outlives_many_losses(cluster: FakeCluster, start: Start) -> None:
    """What it has generated since an instance was lost says that it is not the request that breaks them."""
    for name in cluster.order:
        cluster.fakes[name].faults.break_after = 80
    run = start(600)
    assert await run.finish() == undisturbed(600)
    await cluster.quiet()


async def test_to_be_told_to_leave_is_no_loss(cluster: FakeCluster, start: Start) -> None:
    """As at the deadline of a drain: however often, it is no reason to give a request up."""
    run = start(200)
    for count in range(6):
        await run.reached(10 * (count + 1))
        await eventually(lambda: run.session.unmovable_now() is None)
        run.session.abort_on(cluster.instance("decode-0"))
        resumes = count + 2
        await eventually(lambda resumes=resumes: len(cluster.fakes["decode-0"].asked) == resumes)  # type: ignore[misc]
    assert await run.finish() == undisturbed(200)
    assert cluster.instance("decode-0").health.healthy
    await cluster.quiet()


async def test_without_prefill_instances() -> None:
    async with instances("both", "both", vocabulary=VOCABULARY) as fakes:
        pool, http = await start_pool(fakes, IMPATIENT)
        cluster = FakeCluster(fakes, pool)
        run = Run(cluster, Sampling({}, 60), PROMPT, 1.0)
        await run.reached(10)
        assert (await run.move("both-1")).outcome == "moved"
        assert await run.finish() == undisturbed(60)
        await cluster.quiet()
        await pool.stop()
        await http.close()


async def test_an_aborted_prefill_is_a_loss_and_no_end(cluster: FakeCluster, start: Start) -> None:
    """vLLM's engine answers so when it shuts down: 200, no tokens, and `abort`."""
    prefill = cluster.fakes["prefill-0"]
    prefill.faults.abort = True
    run = start(60)
    assert await run.finish() == undisturbed(60)
    assert prefill.aborted == []
    assert run.finish_reasons == ["length"]
    await cluster.quiet()


async def test_a_resumption_whose_prefill_is_aborted_goes_on(cluster: FakeCluster, start: Start) -> None:
    run = start(100)
    await run.reached(10)
    cluster.fakes["prefill-0"].faults.abort = True
    await cluster.fakes["decode-0"].die()
    assert await run.finish() == undisturbed(100)
    await cluster.quiet()


async def test_a_suspension_that_was_not_heard_leaves_a_request_movable(cluster: FakeCluster, start: Start) -> None:
    run = start(300, timeout_s=0.2)
    await run.reached(10)
    source = run.where
    source.faults.deaf = True
    assert await run.session.suspend() == "source_silent"
    assert run.session.unmovable_now() is None
    source.faults.deaf = False  # now it is cut after all, and goes on from its tokens
    await run.reached(len(run.tokens) + 40)
    assert (await run.move("decode-1")).outcome == "moved"
    assert await run.finish() == undisturbed(300)
    await cluster.quiet()
