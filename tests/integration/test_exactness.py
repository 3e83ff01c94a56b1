"""I1-I5 on real engines: greedy tokens of moved requests equal the unmoved ones, none lost, none doubled."""

import asyncio
import itertools
import random
from collections import Counter

import pytest

from ares.local_cluster import cluster as local
from tests.integration.client import Client
from tests.integration.streams import losses
from tests.integration.tiny_model import VOCABULARY

# Around block boundaries (128 tokens), far from them, and over several blocks.
LENGTHS = (1, 100, 126, 127, 128, 129, 255, 256, 300, 600)
STREAMS = 10
# Seeds: a test that fails runs once more, on the same cluster.
_attempts = itertools.count(7)


def prompts(seed: int = 5) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(3, VOCABULARY) for _ in range(length)] for length in LENGTHS[:STREAMS]]


async def test_the_model_notices_every_token_of_its_context(client: Client) -> None:
    """Without this, equal tokens would prove little: wrong KV must change the output."""
    prompt = prompts()[3]
    first = (await client.complete(prompt, 100))["choices"][0]["token_ids"]
    other = (await client.complete([prompt[0] + 1, *prompt[1:]], 100))["choices"][0]["token_ids"]
    assert len(set(first)) > 80  # a draw of 100 from 1024 has 95 on average
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 10


@pytest.mark.gpu_defaults
async def test_concurrent_streams_moved_again_and_again_are_token_exact(client: Client, cluster: local.Cluster) -> None:
    length = 120 if client.slow else 800
    attempt, lost = next(_attempts), losses(cluster)
    fresh = prompts(attempt)  # seen by no other test, so that nothing of them is cached anywhere
    instances = ("decode-0", "decode-1")
    hits = {name: await client.engine_metric(name, "vllm:external_prefix_cache_hits_total") for name in instances}
    early = await client.gateway_metric("ares_output_step_tokens_total")
    expired = {name: await client.engine_metric(name, "vllm:nixl_num_kv_expired_reqs_total") for name in instances}

    streams = [client.stream(f"exact-{attempt}-{n}", prompt, length) for n, prompt in enumerate(fresh)]
    generator = random.Random(6)
    outcomes: Counter[str] = Counter()

    async def keep_moving(name: str, task: "asyncio.Task[object]") -> int:
        moved = 0
        while not task.done():
            record = await client.move_on(name)
            outcomes[record["outcome"] if record else "not movable"] += 1
            moved += bool(record) and record["outcome"] == "moved"
            await asyncio.sleep(generator.uniform(0.05, 0.2))
        return moved

    moves = await asyncio.gather(*(keep_moving(f"exact-{attempt}-{n}", task) for n, (_, task) in enumerate(streams)))
    outputs = [await task for _, task in streams]

    assert [output.error for output in outputs] == [None] * STREAMS
    assert min(moves) >= 2, f"every stream must move at least twice: {moves}, {outcomes}"
    # Most tokens came over the step channel, one step at a time; the replies have them all.
    early = await client.gateway_metric("ares_output_step_tokens_total") - early
    assert early > STREAMS * length / 2
    # The KV really came over: vLLM's own counters rise by what the moves and the prefills say, and no lease ended.
    await client.quiet()
    history = (await client.status())["migrations"]
    records = [r for r in history if r["request_id"].startswith(f"exact-{attempt}-") and r["outcome"] == "moved"]
    # None would mean that the target never said; 0 is right where its prefix cache still had all full blocks.
    assert all(r["pulled_tokens"] is not None for r in records), records
    risen = sum(
        [await client.engine_metric(name, "vllm:external_prefix_cache_hits_total") - hits[name] for name in instances]
    )
    ahead = sum(r["precopied_tokens"] for r in history if r["request_id"].startswith(f"exact-{attempt}-"))
    if losses(cluster) == lost:  # requests of a lost instance are prefilled and pulled again
        assert risen == sum(r["pulled_tokens"] for r in records) + ahead + sum(LENGTHS[:STREAMS]), outcomes
        for name in instances:
            assert await client.engine_metric(name, "vllm:nixl_num_kv_expired_reqs_total") == expired[name]

    # Only now, so that each of the prefills above was pulled whole.
    expected = await asyncio.gather(*(client.complete(prompt, length) for prompt in fresh))
    for n, (output, reply) in enumerate(zip(outputs, expected, strict=True)):
        reference = reply["choices"][0]
        assert output.token_ids == reference["token_ids"], f"stream {n} after {moves[n]} moves"
        assert output.text == reference["text"]
        assert output.finish_reason == "length"
        assert output.usage == {
            "prompt_tokens": LENGTHS[n],
            "completion_tokens": length,
            "total_tokens": LENGTHS[n] + length,
        }


@pytest.mark.gpu_defaults
async def test_a_cut_at_every_position_around_a_block_boundary(client: Client) -> None:
    """Moves ordered at each of the tokens around the boundary, so that cuts fall before, on and after it."""
    prompt = prompts()[1]  # 100 tokens: the boundary is after output token 28
    expected = (await client.complete(prompt, 60))["choices"][0]["token_ids"]

    async def cut_near(position: int) -> int | None:
        """Return how many tokens of the last block were pulled."""
        name = f"boundary-{position}"
        output, task = client.stream(name, prompt, 60)
        await output.reach(position)
        record = await client.move_on(name)
        assert (await task).token_ids == expected, f"cut near {position}: {record}"
        return record["pulled_tokens"] % 128 if record is not None and record["outcome"] == "moved" else None

    cuts = set(await asyncio.gather(*(cut_near(position) for position in range(20, 34))))
    assert len(cuts - {None}) >= 3, f"cuts fell on too few positions: {cuts}"


async def test_text_is_right_across_cuts(client: Client) -> None:
    """Characters of several bytes, split over instances, come out as if nothing had moved."""
    prompt = prompts()[2]
    expected = (await client.complete(prompt, 300))["choices"][0]
    _, task = client.stream("text", prompt, 300)
    while not task.done():
        await client.move_on("text")
        await asyncio.sleep(0.02)
    assert any(ord(letter) > 127 for letter in expected["text"])
    assert (await task).text == expected["text"]


async def test_a_stop_string_that_spans_the_cut(client: Client) -> None:
    prompt = prompts()[4]
    whole = (await client.complete(prompt, 300))["choices"][0]
    # Twelve characters in the middle of the text, where moves go on all the time.
    middle = len(whole["text"]) // 2
    stop = whole["text"][middle : middle + 12]
    expected = await client.complete(prompt, 300, stop=[stop])
    moved = 0
    _, task = client.stream("stop", prompt, 300, stop=[stop])
    while not task.done():
        record = await client.move_on("stop")
        moved += bool(record) and record["outcome"] == "moved"
    result = await task
    assert moved >= 2
    assert result.finish_reason == "stop"
    assert result.stop_reason == stop
    assert result.text == expected["choices"][0]["text"] == whole["text"][: whole["text"].find(stop)]
    assert result.usage == expected["usage"]
