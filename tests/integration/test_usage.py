"""The usage says how much of a prompt the prefill instance had cached, not what the decode instances pulled."""

from tests.integration.client import Client

# Two blocks of the CPU build, and a part of one.
PROMPT, CACHED = [(11 * n) % 900 + 100 for n in range(300)], 256


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
