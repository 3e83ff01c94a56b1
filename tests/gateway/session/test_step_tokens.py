"""Tokens over the step channel and in the replies: every token once, whatever is lost, moved or slow."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from ares.gateway.pool.merged_tokens import DifferentTokensError
from ares.gateway.tuning import DEFAULT
from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.running import PROMPT, VOCABULARY, FakeCluster, Start, move_once, undisturbed
from tests.waiting import eventually

CHUNK = DEFAULT.chunk_tokens


@pytest.fixture
async def fakes() -> AsyncIterator[list[FakeInstance]]:
    """As elsewhere, of a version with a step channel."""
    async with instances("prefill", "decode", "decode", vocabulary=VOCABULARY, step_tokens=True) as started:
        yield started


async def test_tokens_do_not_wait_for_the_chunks_of_the_reply(cluster: FakeCluster, start: Start) -> None:
    decode = cluster.fakes["decode-0"]
    decode.hold_at = len(PROMPT) + CHUNK // 2 + 2  # within the second chunk of the reply: the first has one token
    run = start(60)
    await run.reached(CHUNK // 2)
    decode.hold_at = None
    assert await run.finish() == undisturbed(60)
    await cluster.quiet()


@pytest.mark.parametrize("lost", [1, 2, 7])
async def test_what_the_step_channel_loses_comes_with_the_reply(cluster: FakeCluster, start: Start, lost: int) -> None:
    cluster.fakes["decode-0"].faults.lose_tokens = lost
    run = start(100)
    assert await run.finish() == undisturbed(100)
    await cluster.quiet()


async def test_a_move_while_the_source_is_within_a_chunk(cluster: FakeCluster, start: Start) -> None:
    await move_once(cluster, start, 100, "moved")


@pytest.mark.parametrize("lost", [1, 3])
async def test_a_move_whose_ends_lose_messages(cluster: FakeCluster, start: Start, lost: int) -> None:
    for fake in cluster.fakes.values():
        fake.faults.lose_tokens = lost
    await move_once(cluster, start, 100, "moved")


async def test_a_move_back_and_forth(cluster: FakeCluster, start: Start) -> None:
    run = start(200)
    for number in range(4):
        await run.reached(20 + 40 * number)
        assert (await run.move(f"decode-{1 - number % 2}")).outcome == "moved"
    assert await run.finish() == undisturbed(200)
    await cluster.quiet()


async def test_the_last_tokens_of_a_source_that_breaks_off_at_the_cut(cluster: FakeCluster, start: Start) -> None:
    cluster.fakes["decode-0"].faults.break_at_cut = True
    run = start(100)
    await run.reached(10)
    await run.move("decode-1")
    assert await run.finish() == undisturbed(100)
    await cluster.quiet()


async def test_an_instance_that_dies_within_a_chunk(cluster: FakeCluster, start: Start) -> None:
    run = start(100)
    await run.reached(CHUNK // 2)
    await cluster.fakes["decode-0"].die()
    assert await run.finish() == undisturbed(100)
    assert run.where.name == "decode-1"
    await cluster.quiet()


async def test_a_suspension_within_a_chunk(cluster: FakeCluster, start: Start) -> None:
    run = start(100)
    await run.reached(CHUNK // 2)
    assert await run.session.suspend() == "suspended"
    assert await run.finish() == undisturbed(100)
    await cluster.quiet()


async def test_a_client_that_does_not_read_for_a_while(cluster: FakeCluster, start: Start) -> None:
    run = start(400)
    await run.reached(10)
    async with run.unread():
        await asyncio.sleep(0.3)
    assert await run.finish() == undisturbed(400)
    await cluster.quiet()


async def test_log_probabilities_come_with_the_reply_alone(cluster: FakeCluster, start: Start) -> None:
    run = start(40, logprobs=1)
    assert await run.finish() == undisturbed(40)
    assert all(delta.logprobs is not None for delta in run.deltas)


async def test_an_instance_that_contradicts_itself_fails_the_request(cluster: FakeCluster, start: Start) -> None:
    """It is not resumed elsewhere: its client has a token of which nobody knows whether it is right."""
    cluster.fakes["decode-0"].faults.wrong_tokens = True
    run = start(100)
    with pytest.raises(DifferentTokensError):
        await run.finish()
    await cluster.quiet()


async def test_streams_that_have_ended_are_forgotten(cluster: FakeCluster, start: Start) -> None:
    """Each ends in another way; until then the step channel brings their tokens."""
    runs = [start(30), start(1000), start(1000)]
    engine = cluster.instance("decode-0").engine
    await runs[1].reached(10)
    await runs[2].reached(10)
    assert engine.step_streams >= 2
    await runs[0].finish()
    await runs[1].leave()
    assert (await runs[2].move("decode-1")).outcome == "moved"
    await eventually(lambda: engine.step_streams == 0)
    await runs[2].leave()
    await cluster.quiet()


async def test_how_many_came_over_the_step_channel(cluster: FakeCluster, start: Start) -> None:
    run = start(60)
    await run.finish()
    assert 40 < run.session.output.step_tokens < 60
    cluster.fakes["decode-0"].faults.lose_tokens = 1
    lost = start(60)
    await lost.finish()
    assert lost.session.output.step_tokens == 0
