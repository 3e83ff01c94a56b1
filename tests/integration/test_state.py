"""What a request's next token depends on beside its tokens: a move carries it, and the output is the unmoved one's.

The unmoved one is what an engine answers that is asked directly, the whole request at once.
"""

import asyncio
import itertools
import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from ares.local_cluster import cluster as local
from tests.integration.client import Client, Output

PROMPT = list(range(100, 250))
LENGTH, SLOW_LENGTH = 250, 60
# A busy machine may be too slow for two moves within one output.
_ATTEMPTS = 15
CARRIED: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.3},
    "minimum": {"min_tokens": 50, "ignore_eos": False},
    "bias": {"logit_bias": {"500": 5.0}},
    "allowed": {"allowed_token_ids": list(range(3, 500))},
    "top-k": {"top_k": 1, "temperature": 0.7},
    # Greedy output of the tiny model never repeats a token: the penalties must reach back to show.
    "frequency": {"frequency_penalty": 1.5, "allowed_token_ids": list(range(3, 40))},
    "presence": {"presence_penalty": 1.5, "allowed_token_ids": list(range(3, 300))},
    "penalties": {
        "frequency_penalty": 0.7,
        "presence_penalty": -0.4,
        "repetition_penalty": 1.2,
        "allowed_token_ids": list(range(3, 60)),
    },
    "seed": {"seed": 7, "temperature": 1.0},
    "seed-zero": {"seed": 0, "temperature": 0.8, "top_k": 500, "top_p": 0.95, "min_p": 0.001},
    "seed-penalties": {"seed": 11, "temperature": 1.5, "frequency_penalty": 1.0, "presence_penalty": 0.5},
    "mixture": {"seed": 2, "temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.5, "min_tokens": 40},
    "minimum-penalty": {
        "min_tokens": 58,
        "ignore_eos": False,
        "presence_penalty": 0.5,
        "logit_bias": {"2": 100.0},
        "allowed_token_ids": [2, *range(10, 400)],
    },
    "regex": {"structured_outputs": {"regex": "[a-z]{230,240}x{3}"}},
    "regex-seed": {"structured_outputs": {"regex": "([a-z]{3},){40}[0-9]{5}"}, "seed": 3, "temperature": 1.0},
    "grammar": {
        "structured_outputs": {
            "grammar": "root ::= " + "item " * 60 + '\nitem ::= "(" [a-z] [a-z] ")" | "<" [0-9] [0-9] ">"'
        },
        "seed": 8,
        "temperature": 1.0,
        "ignore_eos": False,
    },
    "json": {
        "structured_outputs": {
            "json": {
                "type": "array",
                "items": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
                "minItems": 4,
            }
        },
        "seed": 5,
        "temperature": 1.0,
        "ignore_eos": False,
    },
    "choice": {"structured_outputs": {"choice": ["a" * 60, "b" * 70, "cd" * 40]}, "ignore_eos": False},
}


async def unmoved(client: Client, tokens: int, **parameters: Any) -> list[int]:
    """Ask one engine."""
    url = next(i["url"] for i in (await client.status())["instances"] if i["name"] == "decode-1")
    sampling = {"temperature": 0, "ignore_eos": True, **parameters, "max_tokens": tokens, "detokenize": False}
    if "logit_bias" in sampling:
        sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"].items()}
    body = {"token_ids": PROMPT, "sampling_params": sampling}
    async with client.http.post(f"{url}/inference/v1/generate", json=body) as reply:
        assert reply.status == 200, await reply.text()
        return list((await reply.json())["choices"][0]["token_ids"])


async def moved(client: Client, name: str, tokens: int, **parameters: Any) -> list[Output]:
    """Generate while moves go on, again until there were two, and return the outputs."""
    modes = itertools.cycle(("stop_and_copy", "pre_copy"))
    outputs: list[Output] = []
    count = 0
    for attempt in range(_ATTEMPTS):
        _, task = client.stream(f"{name}-{attempt}", PROMPT, tokens, **parameters)
        while not task.done():
            record = await client.move_on(f"{name}-{attempt}", mode=next(modes))
            count += bool(record) and record["outcome"] == "moved"
            await asyncio.sleep(0.02)
        outputs.append(await task)
        if count >= 2:
            return outputs
    raise AssertionError(f"{count} moves in {_ATTEMPTS} outputs of {len(outputs[0].token_ids)} tokens")


@pytest.mark.gpu_defaults
async def test_carried_exactly(client: Client) -> None:
    """All cases at once, as an engine has them: the batches of a moved and an unmoved request differ."""
    length = SLOW_LENGTH if client.slow else LENGTH
    expected = await asyncio.gather(*(unmoved(client, length, **parameters) for parameters in CARRIED.values()))
    results = await asyncio.gather(
        *(moved(client, f"carried-{case}", length, **parameters) for case, parameters in CARRIED.items())
    )
    for case, tokens, outputs in zip(CARRIED, expected, results, strict=True):
        for output in outputs:
            assert output.error is None, case
            assert output.token_ids == tokens, case


async def test_the_parameters_change_the_output(client: Client) -> None:
    """Without this, equality would prove little."""
    for case in ("frequency", "presence", "penalties"):
        parameters = dict(CARRIED[case])
        expected = await unmoved(client, LENGTH, **parameters)
        for penalty in ("frequency_penalty", "presence_penalty"):
            parameters.pop(penalty, None)
        assert await unmoved(client, LENGTH, **parameters) != expected, case
    seeds = [await unmoved(client, 50, seed=seed, temperature=1.0) for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]


async def test_log_probabilities_come_from_where_the_token_was_generated(client: Client) -> None:
    expected = (await client.complete(PROMPT, LENGTH, logprobs=3))["choices"][0]
    for output in await moved(client, "logprobs", LENGTH, logprobs=3):
        assert output.token_ids == expected["token_ids"]
        assert output.logprobs == pytest.approx(expected["logprobs"]["token_logprobs"], abs=1e-3)


@pytest.mark.gpu_defaults
async def test_bad_words_that_span_the_cut(client: Client, cluster: local.Cluster) -> None:
    """Of two tokens each: the second is forbidden after the first, if the first is output."""
    length = SLOW_LENGTH if client.slow else LENGTH
    tokenizer = Tokenizer.from_file(f"{cluster.settings.model}/tokenizer.json")
    plain = await unmoved(client, length)
    words = []
    for first, second in itertools.pairwise(plain):
        word = tokenizer.decode([first, second])
        if tokenizer.encode(word, add_special_tokens=False).ids == [first, second]:
            words.append(word)
    assert len(words) > 5
    words = words[::2][:60]  # vLLM takes 128, and counts each with and without a space before it
    expected = await unmoved(client, length, bad_words=words)
    assert expected != plain
    for output in await moved(client, "bad-words", length, bad_words=words):
        assert output.token_ids == expected


@pytest.mark.gpu_defaults
async def test_a_stop_by_repetition(client: Client) -> None:
    """vLLM ends an output that repeats itself; what repeats may span the cut, and a cut may be at its very end."""
    repeats = 40 if client.slow else 200  # enough for a fast engine to run still when the order to move arrives
    detection = {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": repeats}
    parameters = {"allowed_token_ids": [77], "repetition_detection": detection}
    whole = (await client.complete(PROMPT, LENGTH, **parameters))["choices"][0]
    assert (len(whole["token_ids"]), whole["finish_reason"]) == (repeats, "repetition")

    async def move_after(count: int) -> str | None:
        output, task = client.stream(f"repetition-{count}", PROMPT, LENGTH, **parameters)
        await output.reach(count)
        record = await client.move_on(f"repetition-{count}")
        await task
        assert output.token_ids == whole["token_ids"]
        assert (output.finish_reason, output.stop_reason) == (whole["finish_reason"], whole["stop_reason"])
        return record["outcome"] if record is not None else None

    outcomes = await asyncio.gather(*(move_after(count) for count in (*range(20, 25), *range(repeats - 7, repeats))))
    assert outcomes.count("moved") >= 2, outcomes


async def test_choices_have_their_own_seeds_and_move_on_their_own(client: Client) -> None:
    parameters = {"seed": 11, "temperature": 1.0}
    expected = [await unmoved(client, LENGTH, **{**parameters, "seed": 11 + n}) for n in range(3)]
    body = client.body(PROMPT, LENGTH, n=3, **parameters)

    async def ask(name: str) -> dict[str, Any]:
        url, headers = f"{client.url}/v1/completions", {"x-request-id": name}
        async with client.http.post(url, json=body, headers=headers) as reply:
            answer: dict[str, Any] = await reply.json()
            return answer

    moves = [0, 0, 0]
    for attempt in range(_ATTEMPTS):
        name = f"choices-{attempt}"
        task = asyncio.create_task(ask(name))
        while not task.done():
            for number in range(3):
                record = await client.move_on(f"{name}-{number}")
                moves[number] += bool(record) and record["outcome"] == "moved"
            await asyncio.sleep(0.02)
        answer = await task
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert [choice["token_ids"] for choice in answer["choices"]] == expected
        assert answer["usage"]["prompt_tokens"] == len(PROMPT)
        assert answer["usage"]["completion_tokens"] == 3 * LENGTH
        if min(moves) >= 1:
            return
    raise AssertionError(f"not all choices moved: {moves}")


@pytest.mark.gpu_defaults
async def test_state_survives_kv_that_does_not_arrive(client: Client) -> None:
    """Straight to an engine: it computes all tokens again and goes on with the state as it was."""
    status = await client.status()
    url = next(i["url"] for i in status["instances"] if i["name"] == "decode-0")
    length = 60

    async def resume(case: str, emitted: int) -> None:
        sampling = {"temperature": 0, "ignore_eos": True, **CARRIED[case], "detokenize": False}
        expected = await unmoved(client, length, **CARRIED[case])
        body = {
            "token_ids": PROMPT + expected[:emitted],
            "sampling_params": {**sampling, "max_tokens": length - emitted},
            "kv_transfer_params": {
                "ares_key": f"lost/{case}/{emitted}",
                "ares_generated": emitted,
                "ares_restore": True,
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": "nobody",
                "remote_request_id": "lost",
                "remote_block_ids": [[1, 2]],
                "remote_host": "127.0.0.1",
                "remote_port": 9,
                "tp_size": 1,
                "remote_num_tokens": len(PROMPT) + emitted - 1,
            },
        }
        async with client.http.post(f"{url}/inference/v1/generate", json=body) as reply:
            assert reply.status == 200, await reply.text()
            tokens = (await reply.json())["choices"][0]["token_ids"]
        assert tokens == expected[emitted:], (case, emitted)

    cases = itertools.product(("seed-penalties", "regex-seed", "seed"), (1, 40))
    await asyncio.gather(*(resume(case, emitted) for case, emitted in cases))


async def test_seeded_prompts_that_are_computed_in_pieces(client: Client) -> None:
    """Of prompts that do not fit into one step together, one is computed in pieces beside the others.

    vLLM draws for each piece and takes the draw back, which torch's CPU generator cannot do: a stock CPU engine ends.
    """
    prompts = [[3 + token * factor % 1009 for token in range(3900)] for factor in (7, 11, 13)]
    parameters = {"seed": 5, "temperature": 1.0}
    together = await asyncio.gather(*(client.complete(prompt, 40, **parameters) for prompt in prompts))
    for prompt, result in zip(prompts, together, strict=True):
        alone = await client.complete(prompt, 40, **parameters)
        assert result["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]


async def test_structured_output_is_valid(client: Client) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = {
        "messages": [{"role": "user", "content": "a number"}],
        "max_tokens": 400,
        "temperature": 0,
        "response_format": form,
    }
    async with client.http.post(f"{client.url}/v1/chat/completions", json=body) as reply:
        assert reply.status == 200, await reply.text()
        choice = (await reply.json())["choices"][0]
    # A random model may go on adding digits until the limit; what ends must be valid.
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"])["n"], int)
    else:
        assert choice["message"]["content"].lstrip().startswith("{")
