"""One session over fake instances: every token once and in order, whatever happens between."""

import asyncio

import msgspec
import pytest

from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.delta import Delta, EngineLostError
from ares.gateway.session.handover import NotMovableError
from ares.gateway.session.phase import Phase
from ares.gateway.session.session import Session
from ares.gateway.tuning import Tuning
from tests.gateway.fakes import EOS
from tests.gateway.running import PROMPT, FakeCluster, Run, Start, hold, move_once, undisturbed
from tests.waiting import eventually

# --- without moves ---


async def test_prefill_gives_the_first_token_and_decode_the_rest(cluster: FakeCluster, start: Start) -> None:
    run = start(40, temperature=0.5)
    assert await run.finish() == undisturbed(40)
    assert run.finish_reasons == ["length"]
    prefill, decode = cluster.fakes["prefill-0"], cluster.fakes["decode-0"]
    assert prefill.asked[0]["sampling_params"]["max_tokens"] == 1
    assert prefill.asked[0]["sampling_params"]["temperature"] == 0.5
    assert decode.asked[0]["token_ids"] == PROMPT + undisturbed(1)
    assert decode.asked[0]["sampling_params"]["max_tokens"] == 39
    assert decode.pulled == [decode.asked[0]["kv_transfer_params"]["ares_key"]]
    assert prefill.freed == [prefill.asked[0]["kv_transfer_params"]["ares_key"]]
    await cluster.quiet()


async def test_the_forecast_from_the_first_state_goes_to_every_instance(cluster: FakeCluster, start: Start) -> None:
    prefill = cluster.fakes["prefill-0"]
    prefill.foretells, prefill.forecast = True, "network:0:AAA="
    await move_once(cluster, start, 60, "moved")
    asked = [body for name in ("decode-0", "decode-1") for body in cluster.fakes[name].asked]
    assert len(asked) == 2
    assert {body["kv_transfer_params"].get("ares_first_forecast") for body in asked} == {"network:0:AAA="}
    assert "ares_first_forecast" not in prefill.asked[0]["kv_transfer_params"]


async def test_what_the_source_of_a_move_knows_goes_to_the_target(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["prefill-0"].foretells, cluster.fakes["prefill-0"].forecast = True, "network:0:AAA="
    for name in ("decode-0", "decode-1"):
        cluster.fakes[name].forecast = "network:0:AAA=:7:AAA="
    await move_once(cluster, start, 60, "moved")
    asked = [body for name in ("decode-0", "decode-1") for body in cluster.fakes[name].asked]
    known = [
        body["kv_transfer_params"]["ares_first_forecast"] for body in sorted(asked, key=lambda b: len(b["token_ids"]))
    ]
    assert known == ["network:0:AAA=", "network:0:AAA=:7:AAA="]


async def test_one_token_needs_no_decode_instance(cluster: FakeCluster, start: Start) -> None:
    run = start(1)
    assert await run.finish() == undisturbed(1)
    assert run.finish_reasons == ["length"]
    assert cluster.fakes["decode-0"].asked == cluster.fakes["decode-1"].asked == []
    assert "do_remote_decode" not in cluster.fakes["prefill-0"].asked[0]["kv_transfer_params"]
    await cluster.quiet()


async def test_end_of_sequence_as_the_first_token(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["prefill-0"].eos_at = len(PROMPT)
    run = start(10)
    assert await run.finish() == [EOS]
    assert run.finish_reasons == ["stop"]
    assert cluster.fakes["decode-0"].asked == []
    await cluster.quiet()


async def test_the_token_of_a_prefill_that_has_not_computed_the_whole_prompt(
    cluster: FakeCluster, start: Start
) -> None:
    """It follows a shorter prompt: neither it, nor the end that it seems to be, reaches the client."""
    prefill, decode = cluster.fakes["prefill-0"], cluster.fakes["decode-0"]
    prefill.faults.shortens_prompts, prefill.eos_at = True, len(PROMPT)
    run = start(40)
    assert await run.finish() == undisturbed(40)
    assert run.finish_reasons == ["length"]
    assert decode.asked[0]["token_ids"] == PROMPT
    assert decode.asked[0]["sampling_params"]["max_tokens"] == 40
    assert len(decode.pulled) == len(prefill.freed) == 1
    await cluster.quiet()


async def test_end_of_sequence_while_decoding(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-0"].eos_at = len(PROMPT) + 7
    run = start(50)
    assert await run.finish() == undisturbed(50, eos_at=len(PROMPT) + 7)
    assert run.finish_reasons == ["stop"]


async def test_a_client_that_has_enough_ends_the_generation(cluster: FakeCluster, start: Start) -> None:
    run = start(2000)
    run.stop_after = 5
    await run.finish()
    assert run.tokens[:5] == undisturbed(5)
    await cluster.quiet()
    assert len(cluster.fakes["decode-0"].aborted) == 1


async def test_minimum_tokens_count_over_all_instances(cluster: FakeCluster, start: Start) -> None:
    run = Run(cluster, Sampling({}, 40, 30), PROMPT, 1.0)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "moved"
    await run.finish()
    asked = [cluster.fakes[name].asked[0] for name in ("prefill-0", "decode-0", "decode-1")]
    minimums = [body["sampling_params"]["min_tokens"] for body in asked]
    moved_at = len(asked[2]["token_ids"]) - len(PROMPT)
    assert minimums == [1, 29, max(0, 30 - moved_at)]


async def test_the_phases_on_the_way(cluster: FakeCluster) -> None:
    """Each once, and it waits outside decode until its first tokens come from there."""
    seen: list[tuple[str, bool]] = []

    def note(session: Session) -> None:
        if not seen or seen[-1] != (session.phase.value, session.waits):
            seen.append((session.phase.value, session.waits))

    async def emit(_: list[Delta]) -> bool:
        return False

    session = Session("request", PROMPT, Sampling({}, 300), cluster, 5.0, on_phase=note)
    assert (session.phase, session.waits) == (Phase.PREFILL, True)
    task = asyncio.create_task(session.run(emit))
    await eventually(lambda: len(session.emitted) > 20)
    assert await session.suspend() == "suspended"
    await asyncio.wait_for(task, 60)
    start = [("starting", True), ("decode", True), ("decode", False)]
    assert seen == [("waiting", True), *start, ("suspended", True), ("prefill", True), *start]
    assert session.emitted == undisturbed(300)
    await cluster.quiet()


# --- moves ---


async def test_one_move(cluster: FakeCluster, start: Start) -> None:
    run = start(80)
    await run.reached(10)
    record = await run.move("decode-1")
    assert record.outcome == "moved"
    assert (record.source, record.target) == ("decode-0", "decode-1")
    assert record.stall_s is not None
    assert record.stall_s > 0
    assert run.where.name == "decode-1"
    assert await run.finish() == undisturbed(80)
    assert run.finish_reasons == ["length"]
    assert run.session.moves == 1
    # All but the newest token's KV was pulled.
    assert record.pulled_tokens == len(cluster.fakes["decode-1"].asked[0]["token_ids"]) - 1
    await cluster.quiet()


async def test_the_target_is_told_before_the_source_ends(cluster: FakeCluster, start: Start) -> None:
    """Under the key that the request then comes with; only the target, and only where it understands that."""
    target = cluster.fakes["decode-1"]
    run = start(80)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "moved"
    await run.finish()
    assert target.announced == [target.asked[0]["kv_transfer_params"]["ares_key"]]
    assert not cluster.fakes["decode-0"].announced


async def test_an_earlier_version_is_not_told(cluster: FakeCluster, start: Start) -> None:
    target, state = cluster.fakes["decode-1"], cluster.instance("decode-1").state
    assert state.hello is not None
    state.hello = msgspec.structs.replace(state.hello, expects=False)
    run = start(80)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "moved"
    await run.finish()
    assert not target.announced


async def test_many_moves_back_and_forth(cluster: FakeCluster, start: Start) -> None:
    run = start(400)
    for count in range(8):
        await run.reached(10 * (count + 1))
        record = await run.move(f"decode-{(count + 1) % 2}")
        assert record.outcome == "moved"
    assert await run.finish() == undisturbed(400)
    assert run.session.moves == 8
    await cluster.quiet()


async def test_the_target_starts_before_the_stream_has_brought_the_tail(cluster: FakeCluster, start: Start) -> None:
    """The usual case on real engines: the hand-over overtakes the stream."""
    cluster.fakes["decode-0"].faults.tail_after_s = 0.1
    await move_once(cluster, start, 80, "moved")


async def test_the_stream_ends_before_the_hand_over_is_known(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-0"].faults.handover_after_s = 0.1
    await move_once(cluster, start, 80, "moved")


@pytest.mark.parametrize("in_time", [True, False])
async def test_a_client_that_reads_slowly_loses_nothing_in_a_move(cluster: FakeCluster, *, in_time: bool) -> None:
    """More tokens than a `CutResult` repeats wait for the client at the cut, or until the lease has ended."""
    gate = asyncio.Event()

    async def slow(batch: list[Delta]) -> bool:
        if len(slow_tokens) > 5:
            await gate.wait()
        slow_tokens.extend(token for delta in batch for token in delta.token_ids or [])
        return False

    slow_tokens: list[int] = []
    slow_run = Session(
        "slow", PROMPT, Sampling({}, 300), cluster, 5.0, tuning=Tuning(pinned_kv_kept_s=20.0 if in_time else 0.5)
    )
    task = asyncio.create_task(slow_run.run(slow))
    fake = cluster.fakes["decode-0"]
    await fake.until(lambda: any(len(work.output) > 120 for work in fake.running.values()))
    move = asyncio.create_task(slow_run.hand_over(cluster.instance("decode-1"), "test"))
    await fake.until(lambda: bool(fake.pinned))
    key = next(iter(fake.pinned))
    if not in_time:
        await asyncio.sleep(0.6)
    gate.set()
    assert (await asyncio.wait_for(move, 60)).outcome == "moved"
    await asyncio.wait_for(task, 60)
    assert slow_tokens == undisturbed(300)
    # What may be another request's by now is not pulled.
    assert (key in fake.released) is not in_time
    assert bool(cluster.fakes["decode-1"].pulled) is in_time
    await cluster.quiet()


async def test_a_failed_pull_costs_a_recomputation_only(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-1"].faults.fail_pull = True
    run = start(60)
    await run.reached(10)
    record = await run.move("decode-1")
    assert (record.outcome, record.pulled_tokens) == ("moved", 0)
    assert await run.finish() == undisturbed(60)


async def test_logprobs_of_every_token_come_once(cluster: FakeCluster, start: Start) -> None:
    run = start(60, logprobs=0)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "moved"
    await run.finish()
    content = [p.token_id for delta in run.deltas if delta.logprobs for p in delta.logprobs.content or []]
    assert content == undisturbed(60)


async def test_where_it_is_while_it_moves(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-1"].faults.answer_after_s = 0.1
    run = start(60)
    await run.reached(5)
    assert run.session.unmovable_now() is None
    move = asyncio.create_task(run.move("decode-1"))
    await cluster.fakes["decode-1"].until(lambda: bool(cluster.fakes["decode-1"].asked))
    assert run.session.incoming is cluster.instance("decode-1")
    assert run.session.instance is cluster.instance("decode-0")
    assert run.session.unmovable_now() in {"moving", "not_decoding"}
    with pytest.raises(NotMovableError):
        await run.session.hand_over(cluster.instance("decode-1"), "twice")
    assert (await move).outcome == "moved"
    assert run.session.incoming is None
    await run.finish()
    assert run.session.unmovable_now() == "finished"
    with pytest.raises(NotMovableError):
        await run.move("decode-0")


# --- what is never moved ---


async def test_an_unmovable_session_takes_the_classic_path(cluster: FakeCluster, start: Start) -> None:
    run = start(30, unmovable_reason="seed", seed=7)
    await run.reached(5)
    assert run.session.unmovable_now() == "seed"
    with pytest.raises(NotMovableError) as refusal:
        await run.move("decode-1")
    assert refusal.value.reason == "seed"
    assert await run.finish() == undisturbed(30)
    prefill, decode = cluster.fakes["prefill-0"], cluster.fakes["decode-0"]
    # The state of the generator starts where it is used: no token of the prefill instance reaches the client.
    assert "seed" not in prefill.asked[0]["sampling_params"]
    assert decode.asked[0]["token_ids"] == PROMPT
    assert decode.asked[0]["sampling_params"]["seed"] == 7
    assert decode.asked[0]["sampling_params"]["max_tokens"] == 30
    assert cluster.fakes["decode-0"].cuts == []
    await cluster.quiet()


async def test_an_unmovable_session_whose_instance_dies_fails_visibly(cluster: FakeCluster, start: Start) -> None:
    run = start(200, unmovable_reason="seed", seed=7)
    await run.reached(5)
    await cluster.fakes["decode-0"].die()
    with pytest.raises(EngineLostError, match="seed"):
        await run.finish()


async def test_a_session_before_its_first_decoded_token_is_not_moved(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["prefill-0"].faults.answer_after_s = 0.2
    run = start(10)
    await cluster.fakes["prefill-0"].until(lambda: bool(cluster.fakes["prefill-0"].asked))
    assert run.session.unmovable_now() == "not_decoding"
    with pytest.raises(NotMovableError):
        await run.move("decode-1")
    assert await run.finish() == undisturbed(10)


# --- the end, or the client's leave, in the hand-over ---


async def test_end_of_sequence_in_the_step_of_the_cut(cluster: FakeCluster, start: Start) -> None:
    eos_at = len(PROMPT) + 10
    hold(cluster, 10)
    cluster.fakes["decode-0"].eos_at = eos_at
    run = start(60)
    await run.reached(10)
    record = await run.move("decode-1")  # the cut lets the held engine make one more step
    assert record.outcome == "finished_first"
    assert await run.finish() == undisturbed(60, eos_at=eos_at)
    assert run.finish_reasons == ["stop"]
    assert cluster.fakes["decode-1"].asked == []
    await cluster.quiet()


async def test_its_own_limit_in_the_step_of_the_cut(cluster: FakeCluster, start: Start) -> None:
    hold(cluster, 10)
    run = start(11)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "finished_first"
    assert await run.finish() == undisturbed(11)
    assert run.finish_reasons == ["length"]
    await cluster.quiet()


async def test_a_repetition_that_is_complete_at_the_cut(cluster: FakeCluster, start: Start) -> None:
    hold(cluster, 10)
    cluster.fakes["decode-0"].faults.repeats = True
    run = start(60)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "finished_first"
    assert await run.finish() == undisturbed(11)
    assert run.finish_reasons == ["repetition"]
    assert cluster.fakes["decode-1"].asked == []
    await cluster.quiet()


async def test_a_repetition_that_is_complete_with_the_first_token(cluster: FakeCluster, start: Start) -> None:
    """As of a request that is resumed after a suspension."""
    cluster.fakes["prefill-0"].faults.repeats = True
    run = start(10)
    assert await run.finish() == undisturbed(1)
    assert run.finish_reasons == ["repetition"]
    assert cluster.fakes["decode-0"].asked == []
    await cluster.quiet()


async def test_end_of_sequence_as_the_first_token_of_the_target(cluster: FakeCluster, start: Start) -> None:
    hold(cluster, 10)
    eos_at = len(PROMPT) + 11
    for fake in cluster.fakes.values():
        fake.eos_at = eos_at
    run = start(60)
    await run.reached(10)
    cluster.fakes["decode-1"].hold_at = None
    assert (await run.move("decode-1")).outcome == "moved"
    assert await run.finish() == undisturbed(60, eos_at=eos_at)
    await cluster.quiet()


@pytest.mark.parametrize("breaks_off", [False, True])
async def test_a_stop_string_in_the_tail_of_the_source(cluster: FakeCluster, start: Start, breaks_off: bool) -> None:
    """The target runs already when the gateway finds that the output is complete, perhaps by the hand-over alone."""
    hold(cluster, 10)
    cluster.fakes["decode-0"].faults.break_at_cut = breaks_off
    cluster.fakes["decode-0"].faults.tail_after_s = 0.1
    run = start(60)
    run.stop_after = 11
    await run.reached(10)
    cluster.fakes["decode-1"].hold_at = None
    assert (await run.move("decode-1")).outcome == "finished_first"
    assert await run.finish() == undisturbed(11)
    await cluster.quiet()


@pytest.mark.parametrize("moment", ["cut", "handover", "arrival", "arrived"])
async def test_a_client_that_leaves_in_a_hand_over(cluster: FakeCluster, start: Start, moment: str) -> None:
    source, target = cluster.fakes["decode-0"], cluster.fakes["decode-1"]
    source.faults.handover_after_s = 0.1 if moment == "handover" else 0.0
    source.faults.deaf = moment == "cut"
    target.faults.answer_after_s = 0.1 if moment == "arrival" else 0.0
    target.faults.silent_stream = moment == "arrived"
    run = start(2000)
    await run.reached(10)
    move = asyncio.create_task(run.move("decode-1"))
    if moment == "cut":
        await eventually(lambda: run.session.moving)
    elif moment == "handover":
        await source.until(lambda: bool(source.pinned))
    else:
        await target.until(lambda: bool(target.asked))
    if moment == "arrived":
        await target.until(lambda: bool(target.running))
    await run.leave()
    source.faults.deaf = False
    assert (await move).outcome in {"cancelled", "finished_first"}
    await cluster.quiet()
    if moment == "arrival":
        # The target may be pulling already: a source that frees the KV, and goes to sleep, pulls it from under it.
        assert source.released == []
    given = len(run.tokens)
    assert run.tokens == undisturbed(given)


async def test_a_client_that_leaves_between_prefill_and_decode(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-0"].faults.answer_after_s = 5
    run = start(50)
    await cluster.fakes["decode-0"].until(lambda: bool(cluster.fakes["decode-0"].asked))
    prefill = cluster.fakes["prefill-0"]
    assert len(prefill.pinned) == 1
    key = next(iter(prefill.pinned))
    await run.leave()
    await prefill.until(lambda: key in prefill.released)
    await cluster.quiet()


async def test_a_client_that_leaves_in_the_prefill(cluster: FakeCluster, start: Start) -> None:
    prefill = cluster.fakes["prefill-0"]
    prefill.faults.silent_stream = True
    run = start(50)
    await prefill.until(lambda: bool(prefill.running))
    await run.leave()
    await prefill.until(lambda: len(prefill.aborted) == 1)
    await cluster.quiet()
