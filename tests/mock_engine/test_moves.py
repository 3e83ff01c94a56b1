"""Sessions of the gateway over mock instances: exact tokens, whatever moves, dies or is full."""

import asyncio
import contextlib
import random

import pytest

from ares.gateway.session.handover import NotMovableError
from tests.mock_engine.cluster import MODEL, PROMPT, serving, settings
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(120)


async def test_tokens_are_exact_over_several_moves() -> None:
    async with serving(settings(), "prefill", "decode", "decode") as cluster:
        run = cluster.run(600)
        for count, target in ((40, "decode-1"), (120, "decode-0"), (200, "decode-1")):
            await run.reached(count)
            assert await run.move(target) == "moved"
        assert await run.finish() == MODEL.continuation(PROMPT, 600)
        assert run.reasons == ["length"]
        await cluster.at_rest()
        # One pull after the prefill and one a move; none failed.
        pulls = [cluster.counters(name)["pulls"] for name in ("decode-0", "decode-1")]
        assert pulls == [2, 2]
        assert cluster.counters("decode-0")["cut"] + cluster.counters("decode-1")["cut"] == 3


async def test_an_output_ends_where_the_hash_of_its_prompt_says_also_after_a_move() -> None:
    prompt = next(p for p in ([n, 7] for n in range(1000)) if 150 < len(MODEL.output(p, 1000)) < 400)
    async with serving(settings(), "prefill", "decode", "decode") as cluster:
        run = cluster.run(1000, prompt=prompt, ignore_eos=False)
        await run.reached(20)
        assert await run.move("decode-1") == "moved"
        assert await run.finish() == MODEL.output(prompt, 1000)
        assert run.reasons == ["stop"]
        await cluster.at_rest()


async def test_a_dead_source_costs_a_recomputation_only() -> None:
    async with serving(settings(latency_s=0.5), "prefill", "decode") as cluster:
        run = cluster.run(100)
        # The prefill instance goes while the decode instance pulls from it.
        await eventually(lambda: cluster.counters("decode-0")["loading"] == 1)
        cluster.servers["prefill-0"].stop()
        assert await run.finish() == MODEL.continuation(PROMPT, 100)
        assert cluster.counters("decode-0")["pulls_failed"] == 1
        await cluster.at_rest()


async def test_an_instance_that_dies_loses_its_streams_and_comes_back_with_another_boot() -> None:
    async with serving(settings(), "decode", "decode") as cluster:
        run = cluster.run(400)
        await run.reached(30)
        boot = cluster.instance("decode-0").boot
        cluster.servers["decode-0"].stop()
        await run.reached(60)
        assert run.session.instance is cluster.known("decode-1")
        await cluster.servers["decode-0"].start()
        assert cluster.instance("decode-0").boot != boot
        assert await run.finish() == MODEL.continuation(PROMPT, 400)
        await cluster.at_rest()


async def test_preempted_requests_are_recomputed_and_exact() -> None:
    # Room for about half of what four requests come to.
    behaviour = settings(kv_tokens=640)
    async with serving(behaviour, "decode") as cluster:
        runs = [cluster.run(250, prompt=[n, *PROMPT]) for n in range(4)]
        outputs = await asyncio.gather(*(run.finish() for run in runs))
        assert outputs == [MODEL.continuation([n, *PROMPT], 250) for n in range(4)]
        assert cluster.counters("decode-0")["preemptions"] > 0
        await cluster.at_rest()


async def test_a_client_that_leaves_frees_everything() -> None:
    async with serving(settings(), "prefill", "decode") as cluster:
        runs = [cluster.run(5000, prompt=[n, *PROMPT]) for n in range(8)]
        for run in runs:
            await run.reached(5)
        for run in runs:
            run.task.cancel()
        await asyncio.gather(*(run.task for run in runs), return_exceptions=True)
        await cluster.at_rest()
        assert cluster.counters("decode-0")["aborted"] == 8


@pytest.mark.parametrize("seed", [1, 2])
async def test_random_moves_and_deaths_where_memory_is_short(seed: int) -> None:
    draw = random.Random(seed)
    async with serving(settings(kv_tokens=1024, latency_s=0.01), "prefill", *["decode"] * 4) as cluster:
        decode = [f"decode-{n}" for n in range(4)]
        prompts = [[draw.randrange(3, 900) for _ in range(draw.randint(1, 200))] for _ in range(30)]
        lengths = [draw.randint(1, 300) for _ in prompts]
        runs = []
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            cluster.order = draw.sample(decode, len(decode))
            runs.append(cluster.run(length, prompt=prompt))
            await asyncio.sleep(0.02)
            with contextlib.suppress(NotMovableError):
                await draw.choice(runs).move(draw.choice(decode))
            if number % 10 == 9:
                victim = cluster.servers[draw.choice([*decode, "prefill-0"])]
                victim.stop()
                await victim.start()
        outputs = await asyncio.gather(*(run.finish() for run in runs))
        assert outputs == [MODEL.continuation(p, n) for p, n in zip(prompts, lengths, strict=True)]
        await cluster.at_rest()
