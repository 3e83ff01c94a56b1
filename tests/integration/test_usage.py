"""The usage says how much of a prompt the prefill instance had cached, and its reports what it has computed."""

import asyncio
import itertools
import time

import pytest

from tests.integration.client import Client
from tests.waiting import eventually_found

# Two blocks of the CPU build, and a part of one.
PROMPT, CACHED = [(11 * n) % 900 + 100 for n in range(300)], 256
# A test that fails runs once more, and its prompts must not be cached.
_attempts = itertools.count(1)


async def test_cached_tokens_are_those_of_the_prefill_instance(client: Client) -> None:
    assert [(await client.complete(PROMPT, 3))["cached_tokens"] for _ in range(2)] == [0, CACHED]
    # Of an output of one token, which no decode instance sees, and of one that is moved.
    assert (await client.complete(PROMPT, 1))["cached_tokens"] == CACHED
    output, task = client.stream("usage-1", PROMPT, 200)
    await output.reach(5)
    assert (await client.move_on("usage-1")) is not None
    await task
    assert (output.cached_tokens, len(output.token_ids)) == (CACHED, 200)
    # A prompt that is shorter than a block is never cached.
    body = {"model": client.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    for _ in range(2):
        async with client.http.post(f"{client.url}/v1/chat/completions", json=body) as reply:
            assert (await reply.json())["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.gpu_defaults
async def test_a_prompt_that_is_computed_alone_counts_as_work(client: Client) -> None:
    """With asynchronous scheduling, too, where an empty step is scheduled while it runs."""

    async def work() -> tuple[int, float]:
        row = next(row for row in (await client.status())["instances"] if row["name"] == "prefill-0")
        return row["prompt_tokens"], row["busy_s"]

    attempt, took_s = next(_attempts), 0.0
    await asyncio.sleep(1.0)  # until what other tests have computed is reported
    tokens, busy_s = await work()
    for number in range(3):
        prompt = [(7 * n + 100 * attempt + 10 * number) % 1000 + 3 for n in range(400)]
        began = time.monotonic()
        await client.complete(prompt, 1)
        took_s += time.monotonic() - began

    async def counted() -> bool:
        return (await work())[0] == tokens + 1200

    await eventually_found(counted)
    row = next(row for row in (await client.status())["instances"] if row["name"] == "prefill-0")
    step_s, token_s = row["prefill_time_coefficients"]
    assert 0.0 < 400 * token_s + step_s < took_s
    assert 0.2 * took_s < (await work())[1] - busy_s < took_s
