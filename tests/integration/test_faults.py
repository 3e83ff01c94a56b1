"""What can go wrong in a hand-over: each case ends with the request finished, or running where it was."""

import asyncio
from collections import Counter

import pytest

from tests.integration.client import Client

PROMPT = list(range(200, 340))


@pytest.mark.gpu_defaults
async def test_a_stop_token_in_the_hand_over(client: Client) -> None:
    """A cut races the token that ends the output, at many offsets; whoever wins, the client sees the same."""
    whole = (await client.complete(PROMPT, 60))["choices"][0]["token_ids"]
    stop_at = next(n for n in range(30, 60) if whole[n] not in whole[:n])
    expected = await client.complete(PROMPT, 60, stop_token_ids=[whole[stop_at]])
    outcomes: Counter[object] = Counter()
    early = 3  # tokens before the stop at which the order is given: the two come ever closer
    for attempt in range(40):
        name = f"eos-{attempt}"
        output, task = client.stream(name, PROMPT, 60, stop_token_ids=[whole[stop_at]])
        await output.reach(max(1, stop_at - early))
        row = await client.row(name)
        if row is not None and row["instance"] is not None:
            code, record = await client.migrate(name, "decode-0" if row["instance"] != "decode-0" else "decode-1")
            outcomes[record.get("outcome", code)] += 1
            early = max(0, early - 1) if record.get("outcome") == "moved" else early + 3
        else:
            early += 3
        result = await task
        assert result.token_ids == expected["choices"][0]["token_ids"]
        assert result.finish_reason == "stop"
        assert result.stop_reason == whole[stop_at]
        assert result.usage == expected["usage"]
        if outcomes["moved"] >= 2 and outcomes["finished_first"] >= 2:
            break
    assert "finished_first" in outcomes, f"the race was never lost: {outcomes}"


@pytest.mark.gpu_defaults
async def test_a_client_that_leaves_in_the_hand_over_leaves_nothing(client: Client) -> None:
    """`client` checks at the end of the test that no request, block or pin is left."""
    for attempt in range(12):
        name = f"leave-{attempt}"
        output, task = client.stream(name, PROMPT, 2000)
        await output.reach(5)
        row = await client.row(name)
        assert row is not None
        target = "decode-0" if row["instance"] != "decode-0" else "decode-1"
        move = asyncio.create_task(client.migrate(name, target))
        await asyncio.sleep(0.004 * attempt)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        code, record = await move
        assert code in (200, 404, 409)
        if code == 200:
            assert record["outcome"] in ("moved", "cancelled", "finished_first")
    await client.quiet()


async def test_a_client_that_leaves_before_or_in_prefill(client: Client) -> None:
    for attempt in range(10):
        _, task = client.stream(f"early-{attempt}", [7 + attempt] * 2500, 50)
        await asyncio.sleep(0.02 * attempt)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await client.quiet()


async def test_a_full_target_is_refused_and_the_request_goes_on(client: Client) -> None:
    output, task = client.stream("mover", PROMPT, 3500)
    await output.reach(3)
    row = await client.row("mover")
    assert row is not None
    source = row["instance"]
    # Fill the others: requests that cannot move, placed in turns; eight of them fill an instance's 128 blocks.
    fillers = []
    for number in range(24):
        _, filler = client.stream(f"filler-{number}", [9 + number] * 2000, 2000, seed=1)
        fillers.append(filler)
    target = None
    for _ in range(1500):
        status = await client.status()
        full = [
            i["name"]
            for i in status["instances"]
            if i["role"] == "decode" and i["name"] != source and i["kv_blocks"] - i["kv_blocks_used"] < 3
        ]
        if full:
            target = full[0]
            break
        await asyncio.sleep(0.02)
    assert target is not None, "the fillers never filled an instance"
    code, answer = await client.migrate("mover", target)
    for filler in fillers:
        filler.cancel()
    await asyncio.gather(*fillers, return_exceptions=True)
    assert code == 409, answer
    assert "full" in answer["error"]["message"]
    result = await task
    assert result.finish_reason == "length"
    assert len(result.token_ids) == 3500


async def test_refusals_name_what_is_wrong(client: Client) -> None:
    output, task = client.stream("refused", PROMPT, 400)
    await output.reach(3)
    row = await client.row("refused")
    assert row is not None
    cases = [
        ("nobody", "decode-1", 404, "nobody"),
        ("refused", "decode-9", 404, "decode-9"),
        ("refused", row["instance"], 409, "already"),
        ("refused", "prefill-0", 409, "does not decode"),
    ]
    for name, target, code, words in cases:
        got, answer = await client.migrate(name, target)
        assert got == code
        assert words in answer["error"]["message"]
    assert len((await task).token_ids) == 400


async def test_preempted_requests_stay_exact(client: Client) -> None:
    """More tokens than an instance holds: vLLM preempts and recomputes; moves in between change no token."""
    prompt_list = [[50 + n] * 1500 for n in range(4)]
    expected = [(await client.complete(p, 250))["choices"][0]["token_ids"] for p in prompt_list]
    streams = [client.stream(f"tight-{n}", p, 250) for n, p in enumerate(prompt_list * 3)]

    async def mover(name: str, task: "asyncio.Task[object]") -> None:
        while not task.done():
            await client.move_on(name)
            await asyncio.sleep(0.2)

    await asyncio.gather(*(mover(f"tight-{n}", task) for n, (_, task) in enumerate(streams)))
    for n, (_, task) in enumerate(streams):
        assert (await task).token_ids == expected[n % 4]


async def test_a_pull_that_fails_is_recomputed(client: Client) -> None:
    """Straight to an engine: the KV is said to be where nobody is, and the tokens are right all the same."""
    prompt = [400 + n for n in range(300)]
    expected = (await client.complete(prompt, 40))["choices"][0]["token_ids"]
    url = next(i["url"] for i in (await client.status())["instances"] if i["name"] == "decode-1")
    body = {
        "token_ids": prompt + expected[:10],
        "sampling_params": {"max_tokens": 30, "temperature": 0, "ignore_eos": True, "detokenize": False},
        "kv_transfer_params": {
            "ares_key": "lost/1",
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": "nobody",
            "remote_request_id": "lost",
            "remote_block_ids": [[1, 2, 3]],
            "remote_host": "127.0.0.1",
            "remote_port": 9,
            "tp_size": 1,
            "remote_num_tokens": 309,
        },
    }
    async with client.http.post(f"{url}/inference/v1/generate", json=body) as reply:
        assert reply.status == 200, await reply.text()
        tokens = (await reply.json())["choices"][0]["token_ids"]
    assert tokens == expected[10:]
