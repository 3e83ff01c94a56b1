"""What a move carries exactly is moved; what it would not carry stays where it is, and says why."""

import asyncio
import json
from typing import Any

import pytest

from tests.integration.client import Client

PROMPT = list(range(1000, 1150))
CARRIED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"min_tokens": 250, "ignore_eos": False},
    {"logprobs": 3},
    {"logit_bias": {"2000": 5.0}},
    {"allowed_token_ids": list(range(3, 5000))},
    {"top_k": 1, "temperature": 0.7},
]
PINNED: list[dict[str, Any]] = [
    {"seed": 7, "temperature": 1.0},
    {"frequency_penalty": 1.5},
    {"presence_penalty": 1.5},
    {"bad_words": ["the"]},
    {"structured_outputs": {"regex": "[a-z]{180,200}"}},
]


@pytest.mark.parametrize("parameters", CARRIED, ids=lambda p: next(iter(p)))
async def test_carried_exactly(client: Client, parameters: dict[str, Any]) -> None:
    expected = (await client.complete(PROMPT, 250, **parameters))["choices"][0]
    _, task = client.stream("carried", PROMPT, 250, **parameters)
    moved = 0
    while not task.done():
        record = await client.move_on("carried")
        moved += bool(record) and record["outcome"] == "moved"
        await asyncio.sleep(0.02)
    result = await task
    assert moved >= 2
    assert result.token_ids == expected["token_ids"]
    if "logprobs" in parameters:
        reference = expected["logprobs"]["token_logprobs"]
        assert result.logprobs == pytest.approx(reference, abs=1e-3)


@pytest.mark.parametrize("parameters", PINNED, ids=lambda p: next(iter(p)))
async def test_not_carried_is_never_moved(client: Client, parameters: dict[str, Any]) -> None:
    expected = (await client.complete(PROMPT, 150, **parameters))["choices"][0]
    output, task = client.stream("pinned", PROMPT, 150, **parameters)
    await output.reach(5)
    row = await client.row("pinned")
    assert row is not None
    assert not row["movable"]
    assert row["reason"] == next(iter(parameters))
    target = "decode-0" if row["instance"] != "decode-0" else "decode-1"
    code, answer = await client.migrate("pinned", target)
    assert code == 409
    assert answer["error"]["code"] == row["reason"]
    # Refused means untouched, and reproducible as on a single instance.
    assert (await task).token_ids == expected["token_ids"]
    async with client.http.get(f"{client.url}/metrics") as reply:
        metrics = await reply.text()
    assert f'ares_unmovable_requests_total{{reason="{row["reason"]}"}}' in metrics


async def test_choices_have_their_own_seeds_and_are_independent(client: Client) -> None:
    body = {"n": 3, "seed": 11, "temperature": 1.0}
    first = await client.complete(PROMPT, 30, **body)
    again = await client.complete(PROMPT, 30, **body)
    texts = [choice["text"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice["text"] for choice in again["choices"]]
    assert first["usage"]["prompt_tokens"] == len(PROMPT)
    assert first["usage"]["completion_tokens"] == 90


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
