"""Instances, streams and answers that fail or stay away: the session goes on, or says why it cannot."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from ares.gateway.control.predictions import rows_by_key
from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.generate import Delta, EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import NoInstanceError
from ares.gateway.session.pending_call import PendingCall
from ares.gateway.session.phase import Phase
from ares.gateway.session.session import Session
from tests.gateway.fakes import eventually, instances
from tests.gateway.running import (
    IMPATIENT,
    PROMPT,
    VOCABULARY,
    Bench,
    Run,
    Start,
    acquaint,
    hold,
    stop_holding,
    undisturbed,
)

# --- the target fails ---


async def goes_on_at_the_source(bench: Bench, run: Run, outcome: str = "returned") -> None:
    record = await run.move("decode-1")
    assert record.outcome == outcome
    await run.reached(len(run.tokens) + 1)
    assert run.where.name == "decode-0"
    maximum = run.session.sampling.maximum_tokens
    assert await run.finish() == undisturbed(maximum)
    await bench.quiet()


@pytest.mark.parametrize("status", [400, 429, 500, 503])
async def test_a_target_that_refuses(bench: Bench, start: Start, status: int) -> None:
    bench.fakes["decode-1"].faults.refuse = status
    run = start(150)
    await run.reached(10)
    await goes_on_at_the_source(bench, run)


async def test_a_target_that_is_dead(bench: Bench, start: Start) -> None:
    run = start(150)
    await run.reached(10)
    await bench.fakes["decode-1"].die()
    await goes_on_at_the_source(bench, run)


async def test_a_target_that_hangs_before_it_answers(bench: Bench, start: Start) -> None:
    bench.fakes["decode-1"].faults.hang = True
    run = start(600, timeout_s=0.3)
    await run.reached(10)
    began = asyncio.get_running_loop().time()
    await goes_on_at_the_source(bench, run)
    assert asyncio.get_running_loop().time() - began < 4


async def test_a_target_that_hangs_stalls_the_client_for_one_timeout(bench: Bench, start: Start) -> None:
    bench.fakes["decode-1"].faults.hang = True
    run = start(600, timeout_s=1.0)
    await run.reached(10)
    move = asyncio.create_task(run.move("decode-1"))
    source = bench.fakes["decode-0"]
    await source.until(lambda: bool(source.pinned))
    began = asyncio.get_running_loop().time()
    await run.reached(len(run.tokens) + 3)
    assert asyncio.get_running_loop().time() - began < 1.9
    assert (await move).outcome == "returned"


async def test_a_target_that_never_sends_a_token(bench: Bench, start: Start) -> None:
    bench.fakes["decode-1"].faults.silent_stream = True
    run = start(150, timeout_s=0.3)
    await run.reached(10)
    await goes_on_at_the_source(bench, run)
    assert len(bench.fakes["decode-1"].aborted) == 1


async def test_a_target_that_dies_before_its_first_token(bench: Bench, start: Start) -> None:
    target = bench.fakes["decode-1"]
    target.faults.silent_stream = True
    run = start(150, timeout_s=5)
    await run.reached(10)
    move = asyncio.create_task(run.move("decode-1"))
    await target.until(lambda: bool(target.running))
    await target.die()
    assert (await move).outcome == "returned"
    assert await run.finish() == undisturbed(150)
    await bench.quiet()


async def test_a_target_that_fails_the_request_in_its_stream(bench: Bench, start: Start) -> None:
    bench.fakes["decode-1"].faults.error_in_stream = 500
    run = start(100)
    await run.reached(10)
    record = await run.move("decode-1")
    assert record.outcome in {"moved", "returned"}  # the error may come with the first token
    assert await run.finish() == undisturbed(100)
    await bench.quiet()


async def test_more_failed_moves_than_a_request_has_attempts(bench: Bench, start: Start) -> None:
    """A policy that insists on a bad target costs moves, never the request."""
    bench.fakes["decode-1"].faults.refuse = 503
    run = start(600)
    for count in range(6):
        await run.reached(10 * (count + 1))
        await eventually(lambda: run.session.unmovable_reason() is None)
        assert (await run.move("decode-1")).outcome == "returned"
    assert await run.finish() == undisturbed(600)


async def test_failed_moves_leave_no_trace_in_the_target(bench: Bench, start: Start) -> None:
    bench.fakes["decode-1"].faults.silent_stream = True
    run = start(150, timeout_s=0.2)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "returned"
    await run.finish()
    assert bench.instance("decode-1").control.waiting_for == 0
    assert bench.instance("decode-0").control.waiting_for == 0


# --- the source fails ---


async def test_a_source_that_dies_while_it_decodes(bench: Bench, start: Start) -> None:
    run = start(100)
    await run.reached(10)
    await bench.fakes["decode-0"].die()
    assert await run.finish() == undisturbed(100)
    assert run.where.name == "decode-1"
    await bench.quiet()


async def test_a_stream_that_breaks_on_a_living_instance(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.break_after = 10
    run = start(60)
    assert await run.finish() == undisturbed(60)
    await bench.quiet()


@pytest.mark.parametrize(("most", "survives"), [(2, False), (20, True)])
async def test_it_survives_so_many_losses(bench: Bench, start: Start, most: int, survives: bool) -> None:
    decoding = [fake for fake in bench.fakes.values() if fake.role == "decode"]
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
    await bench.quiet()


async def test_an_instance_that_aborts_what_it_runs(bench: Bench, start: Start) -> None:
    run = start(100)
    await run.reached(10)
    bench.fakes["decode-0"].faults.abort = True
    await run.reached(20)
    assert await run.finish() == undisturbed(100)


async def test_an_engine_error_in_the_stream(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.error_in_stream = 500
    run = start(40)
    assert await run.finish() == undisturbed(40)


async def test_a_request_that_the_engine_refuses_in_its_stream(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.error_in_stream = 400
    run = start(40)
    with pytest.raises(EngineRefusedError):
        await run.finish()
    await bench.quiet()


@pytest.mark.parametrize("parameters", [{}, {"logprobs": 0}], ids=["plain", "logprobs"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_source_that_breaks_off_after_the_cut(
    bench: Bench, start: Start, when: str, parameters: dict[str, Any]
) -> None:
    """Before or after the target has taken over: each token once, one owner, nothing left behind."""
    source, target = bench.fakes["decode-0"], bench.fakes["decode-1"]
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
    await bench.quiet()
    if parameters:
        content = [p.token_id for delta in run.deltas if delta.logprobs for p in delta.logprobs.content or []]
        assert content == undisturbed(150)


async def test_a_source_that_breaks_off_with_more_than_a_handover_repeats(bench: Bench) -> None:
    """The client reads slowly: of the tokens in flight only the last are known when the stream breaks."""
    source = bench.fakes["decode-0"]
    source.faults.break_at_cut = True
    gate, tokens = asyncio.Event(), list[int]()

    async def slow(batch: list[Delta]) -> bool:
        if len(tokens) > 5:
            await gate.wait()
        tokens.extend(token for delta in batch for token in delta.token_ids or [])
        return False

    session = Session("slow", PROMPT, Sampling({}, 250), bench, 2.0)
    task = asyncio.create_task(session.run(slow))
    await source.until(lambda: any(len(work.output) > 120 for work in source.running.values()))
    move = asyncio.create_task(session.hand_over(bench.instance("decode-1"), "test"))
    await source.until(lambda: bool(source.pinned))
    await asyncio.sleep(0.05)  # the reset arrives while the client blocks
    gate.set()
    assert (await asyncio.wait_for(move, 5)).outcome in {"moved", "returned"}
    await asyncio.wait_for(task, 5)
    assert tokens == undisturbed(250)
    await bench.quiet()


async def test_a_stop_string_in_the_tail_of_a_source_that_breaks_off(bench: Bench, start: Start) -> None:
    """The token that completes the output is known from the hand-over only."""
    hold(bench, 10)
    bench.fakes["decode-0"].faults.break_at_cut = True
    bench.fakes["decode-0"].faults.tail_after_s = 0.1
    run = start(60)
    run.stop_after = 11
    await run.reached(10)
    bench.fakes["decode-1"].hold_at = None
    assert (await run.move("decode-1")).outcome == "finished_first"
    assert await run.finish() == undisturbed(11)
    await bench.quiet()


async def test_a_source_and_a_target_that_both_fail(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.break_at_cut = True
    bench.fakes["decode-1"].faults.refuse = 500
    run = start(100)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "returned"
    assert await run.finish() == undisturbed(100)
    await bench.quiet()


async def test_a_source_that_is_preempted_or_waits(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.not_running = True
    run = start(60)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "not_running"
    assert run.session.unmovable_reason() in {None, "finished"}
    assert await run.finish() == undisturbed(60)
    assert bench.fakes["decode-1"].asked == []


async def test_a_lost_handover(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.lose_handover = True
    run = start(100, timeout_s=0.3)
    await run.reached(10)
    record = await run.move("decode-1")
    assert record.outcome in {"source_silent", "returned"}
    assert await run.finish() == undisturbed(100)
    await bench.quiet()


async def test_a_handover_after_the_timeout(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.handover_after_s = 0.5
    run = start(100, timeout_s=0.2)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "source_silent"
    assert await run.finish() == undisturbed(100)
    await bench.quiet()


async def test_a_source_that_does_not_hear_the_cut(bench: Bench, start: Start) -> None:
    source = bench.fakes["decode-0"]
    source.faults.deaf = True
    run = start(200, timeout_s=0.1)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "source_silent"
    source.faults.deaf = False  # it hears the cut now, when nobody waits for its answer
    assert await run.finish() == undisturbed(200)
    await bench.quiet()


async def test_a_cut_without_a_taker_does_not_blame_the_instance(bench: Bench, start: Start) -> None:
    """A late cut on the only living decode instance must not leave the request without one."""
    source = bench.fakes["decode-0"]
    run = start(200, timeout_s=0.1)
    await run.reached(10)
    source.faults.deaf = True
    assert (await run.move("decode-1")).outcome == "source_silent"
    await bench.fakes["decode-1"].die()
    await eventually(lambda: not bench.instance("decode-1").health.healthy)
    source.faults.deaf = False
    assert await run.finish() == undisturbed(200)


# --- nobody is there, or some are not ---


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


async def test_an_output_that_is_lost_again_and_again_says_so(bench: Bench, start: Start) -> None:
    for name in bench.order:
        bench.fakes[name].faults.break_after = 2
    run = start(60)
    with pytest.raises(EngineLostError, match="lost 4 times, the last time: the stream broke"):
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


async def test_instances_that_all_refuse_are_counted(bench: Bench, start: Start) -> None:
    for name in bench.order:
        bench.fakes[name].faults.refuse = 503
    run = start(60)
    with pytest.raises(EngineLostError, match="2 instances in turn did not take the request, the last one: decode-1"):
        await run.finish()
    await bench.quiet()


async def test_telemetry_that_says_loading_costs_no_stream_that_runs(bench: Bench, start: Start) -> None:
    hold(bench, 20)
    run = start(60, unmovable_reason="seed")
    await run.reached(10)
    run.session.supervise(1e6)
    stop_holding(bench)
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


# --- what instances say has gone out, and does not come ---


async def looked_after(run: Run) -> None:
    """Look at the session as the gateway does, until it has ended."""
    since: dict[str, float] = {}
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10):
        while not run.task.done():
            overdue = run.session.overdue(rows_by_key(run.bench.pool.instances))
            since = {overdue: since.get(overdue, loop.time())} if overdue is not None else {}
            run.session.supervise(loop.time() - since[overdue] if overdue is not None else 0.0)
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("length", [40, 600])
async def test_a_stream_that_falls_silent_while_its_instance_works_on(bench: Bench, start: Start, length: int) -> None:
    """Its connection was forgotten by the network; a short output is complete there before anybody misses it."""
    bench.fakes["decode-0"].faults.mute_after = 10
    run = start(length, timeout_s=0.2)
    await run.reached(10)
    bench.order = ["decode-1"]
    await looked_after(run)
    assert await run.finish() == undisturbed(length)
    await bench.quiet()
    assert len(bench.fakes["decode-1"].asked) == 1


async def test_a_prefill_that_is_never_answered(bench: Bench, start: Start) -> None:
    bench.fakes["prefill-0"].faults.hang = True
    run = start(30, timeout_s=0.2)
    await looked_after(run)
    assert await run.finish() == undisturbed(30)


async def test_who_waits_for_an_instance_that_is_slow_goes_on_waiting(bench: Bench, start: Start) -> None:
    """It has generated nothing that is missing, and still has the request."""
    hold(bench, 20)
    run = start(60, timeout_s=0.1)
    await run.reached(20)
    watching = asyncio.create_task(looked_after(run))
    await asyncio.sleep(0.6)
    stop_holding(bench)
    await watching
    assert await run.finish() == undisturbed(60)
    assert not bench.fakes["decode-1"].asked


async def test_a_client_that_does_not_read_is_not_taken_for_a_silent_instance(bench: Bench) -> None:
    gate = asyncio.Event()

    async def unread(batch: list[Delta]) -> bool:
        await gate.wait()
        return False

    session = Session("unread", PROMPT, Sampling({}, 300), bench, 0.1)
    task = asyncio.create_task(session.run(unread))
    fake = bench.fakes["decode-0"]
    await fake.until(lambda: bool(bench.fakes["prefill-0"].asked))
    gate.set()
    await eventually(lambda: session.phase is Phase.DECODE)
    gate.clear()
    await fake.until(lambda: any(len(work.output) > 120 for work in fake.running.values()))
    await eventually(lambda: any(row.output > 120 for row in rows_by_key(bench.pool.instances).values()))
    assert session.overdue(rows_by_key(bench.pool.instances)) is None
    gate.set()
    await asyncio.wait_for(task, 5)
    assert session.emitted == undisturbed(300)


# --- a prefill instance that is about to end ---


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
