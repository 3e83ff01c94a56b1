"""Prefill and decode instances that are missing, refuse, or end: the request goes on, or says why it cannot."""

import pytest

from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.generate import EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import NoInstanceError
from tests.gateway.fakes import instances
from tests.gateway.running import (
    IMPATIENT,
    PROMPT,
    VOCABULARY,
    Bench,
    Run,
    Start,
    acquaint,
    undisturbed,
)
from tests.waiting import eventually


async def test_a_prefill_instance_that_dies_is_done_without(bench: Bench, start: Start) -> None:
    await bench.fakes["prefill-0"].die()
    run = start(30)
    assert await run.finish() == undisturbed(30)


async def test_a_prefill_connection_that_breaks_leaves_nothing_pinned(bench: Bench, start: Start) -> None:
    """The instance lives on: it must learn that nobody wants this prompt."""
    prefill = bench.fakes["prefill-0"]
    prefill.faults.silent_stream = True
    run = start(30)
    await prefill.until(lambda: bool(prefill.running))
    key = next(iter(prefill.running))
    prefill.reset_connections()
    prefill.faults.silent_stream = False
    assert await run.finish() == undisturbed(30)
    await prefill.until(lambda: key in prefill.released)
    await bench.quiet()


@pytest.mark.parametrize("status", [500, 503])
async def test_an_instance_that_fails_at_the_door_is_not_the_last_word(bench: Bench, start: Start, status: int) -> None:
    bench.fakes["prefill-0"].faults.refuse = status
    bench.fakes["decode-0"].faults.refuse = status
    run = start(30)
    assert await run.finish() == undisturbed(30)
    await bench.quiet()


async def test_a_request_that_the_engine_refuses(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.refuse = 400
    run = start(30)
    with pytest.raises(EngineRefusedError, match="decode-0 refuses"):
        await run.finish()
    await bench.quiet()


async def test_no_decode_instance(bench: Bench, start: Start) -> None:
    bench.order = []
    run = start(30)
    with pytest.raises(NoInstanceError):
        await run.finish()
    await bench.quiet()


async def test_all_decode_instances_die(bench: Bench, start: Start) -> None:
    run = start(300)
    await run.reached(5)
    await bench.fakes["decode-1"].die()
    await bench.fakes["decode-0"].die()
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
    bench: Bench, start: Start, faults: dict[str, int], message: str
) -> None:
    for name in bench.order:
        for fault, value in faults.items():
            setattr(bench.fakes[name].faults, fault, value)
    run = start(60)
    with pytest.raises(EngineLostError, match=message):
        await run.finish()
    assert run.tokens == undisturbed(60)[: len(run.tokens)]
    await bench.quiet()


async def test_to_be_told_to_leave_is_no_loss(bench: Bench, start: Start) -> None:
    """As at the deadline of a drain: however often, it is no reason to give a request up."""
    run = start(200)
    for count in range(6):
        await run.reached(10 * (count + 1))
        await eventually(lambda: run.session.unmovable_reason() is None)
        run.session.leave(bench.instance("decode-0"))
        resumes = count + 2
        await eventually(lambda resumes=resumes: len(bench.fakes["decode-0"].asked) == resumes)  # type: ignore[misc]
    assert await run.finish() == undisturbed(200)
    assert bench.instance("decode-0").health.healthy
    await bench.quiet()


async def test_without_prefill_instances() -> None:
    async with instances("both", "both", vocabulary=VOCABULARY) as fakes:
        pool, http = await acquaint(fakes, IMPATIENT)
        bench = Bench(fakes, pool)
        run = Run(bench, Sampling({}, 60), PROMPT, 1.0)
        await run.reached(10)
        assert (await run.move("both-1")).outcome == "moved"
        assert await run.finish() == undisturbed(60)
        await bench.quiet()
        await pool.stop()
        await http.close()


async def test_an_aborted_prefill_is_a_loss_and_no_end(bench: Bench, start: Start) -> None:
    """vLLM's engine answers so when it shuts down: 200, no tokens, and `abort`."""
    prefill = bench.fakes["prefill-0"]
    prefill.faults.abort = True
    run = start(60)
    assert await run.finish() == undisturbed(60)
    assert prefill.aborted == []
    assert run.finish_reasons == ["length"]
    await bench.quiet()


async def test_a_resumption_whose_prefill_is_aborted_goes_on(bench: Bench, start: Start) -> None:
    run = start(100)
    await run.reached(10)
    bench.fakes["prefill-0"].faults.abort = True
    await bench.fakes["decode-0"].die()
    assert await run.finish() == undisturbed(100)
    await bench.quiet()


async def test_a_suspension_that_was_not_heard_leaves_a_request_movable(bench: Bench, start: Start) -> None:
    run = start(300, timeout_s=0.2)
    await run.reached(10)
    source = run.where
    source.faults.deaf = True
    assert await run.session.suspend() == "source_silent"
    assert run.session.unmovable_reason() is None
    source.faults.deaf = False  # now it is cut after all, and goes on from its tokens
    await run.reached(len(run.tokens) + 40)
    assert (await run.move("decode-1")).outcome == "moved"
    assert await run.finish() == undisturbed(300)
    await bench.quiet()
