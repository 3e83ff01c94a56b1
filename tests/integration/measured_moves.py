"""Streams that are moved all the time, compared with the outputs of one instance that is asked for them whole."""

import asyncio
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.integration.client import Client, Output
from tests.integration.tiny_model import VOCABULARY

# Each run has prompts and names of its own: an earlier one on the same instances has left KV and records there.
_RUNS = itertools.count(11)
INSTANCES = ("decode-0", "decode-1")
PULLED = "vllm:external_prefix_cache_hits_total"
EXPIRED = "vllm:nixl_num_kv_expired_reqs_total"


@dataclass(slots=True)
class Measured:
    """What a run has found.

    Attributes
    ----------
    moves
        Orders by mode and outcome, as text.
    compared, wrong
        Output tokens of moved streams, and how many of them differ from the reference; errors count as wrong.
    pulled, expected
        Prompt tokens that vLLM has counted as pulled, and as many as prefills, copies and moves tell.
    expired
        Leases that ended before their KV was pulled.
    first_differences
        For each stream that differs: its name, its first wrong token, its prompt's length.
    references
        The right outputs, by stream.
    """

    moves: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    wrong: int = 0
    pulled: int = 0
    expected: int = 0
    expired: int = 0
    first_differences: list[tuple[str, int, int]] = field(default_factory=list)
    references: dict[str, list[int]] = field(default_factory=dict)

    @property
    def moved(self) -> int:
        """Moves that came to their end."""
        return sum(count for what, count in self.moves.items() if what.endswith(" moved"))

    def figures(self) -> dict[str, Any]:
        """Return the numbers for a record."""
        return {
            "moves": self.moved,
            "orders": dict(sorted(self.moves.items())),
            "tokens_compared": self.compared,
            "wrong_tokens": self.wrong,
            "pulled_tokens": self.pulled,
            "expected_pulled_tokens": self.expected,
            "leases_expired": self.expired,
            "first_differences": self.first_differences,
        }


async def measure(
    client: Client,
    lengths: tuple[int, ...],
    tokens: int,
    modes: tuple[str, ...],
    adapters: tuple[str, ...] = (),
) -> Measured:
    """Stream the same prompts for the model and each adapter, moving all the time, and compare.

    Parameters
    ----------
    lengths
        Of the prompts.
    tokens
        Of each output.
    """
    run = next(_RUNS)
    generator = random.Random(run)
    prompts = [[generator.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]
    asked = {
        f"{adapter or 'model'}-{len(prompt)}-{run}": (adapter, prompt)
        for adapter, prompt in itertools.product((None, *adapters), prompts)
    }
    found = Measured()
    before = [await _sum(client, PULLED), await _sum(client, EXPIRED)]
    streams: dict[str, tuple[Output, asyncio.Task[Output]]] = {}
    for name, (adapter, prompt) in asked.items():
        streams[name] = client.stream(name, prompt, tokens, **({"model": adapter} if adapter else {}))
    await asyncio.gather(*(_keep_moving(client, name, task, modes, found) for name, (_, task) in streams.items()))
    outputs = {name: await task for name, (_, task) in streams.items()}
    await client.quiet()
    records = [r for r in (await client.status())["migrations"] if r["request_id"] in asked]
    found.expected = sum(len(prompt) for _, prompt in asked.values())
    found.expected += sum((r["pulled_tokens"] or 0) + r["precopied_tokens"] for r in records)
    found.pulled = int(await _sum(client, PULLED) - before[0])
    found.expired = int(await _sum(client, EXPIRED) - before[1])
    for name, (adapter, prompt) in asked.items():
        found.references[name] = await _reference(client, prompt, tokens, adapter)
        _compare(found, name, outputs[name], len(prompt))
    return found


async def _keep_moving(
    client: Client, name: str, task: "asyncio.Task[Output]", modes: tuple[str, ...], found: Measured
) -> None:
    generator, turns = random.Random(name), itertools.cycle(modes)
    while not task.done():
        record = await client.move_on(name, mode=next(turns))
        if record is not None:
            found.moves[f"{record['mode']} {record['outcome']}"] += 1
        await asyncio.sleep(generator.uniform(0.05, 0.3))


async def _reference(client: Client, prompt: list[int], tokens: int, adapter: str | None) -> list[int]:
    """Ask the prefill instance for the whole output: it has never pulled anything, so its cached KV is its own."""
    url = next(i["url"] for i in (await client.status())["instances"] if i["role"] == "prefill")
    sampling = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "detokenize": False}
    body = {"token_ids": prompt, "sampling_params": sampling, **({"model": adapter} if adapter else {})}
    async with client.http.post(f"{url}/inference/v1/generate", json=body) as reply:
        assert reply.status == 200, await reply.text()
        choice: dict[str, list[int]] = (await reply.json())["choices"][0]
    return choice["token_ids"]


def _compare(found: Measured, name: str, output: Output, prompt_tokens: int) -> None:
    reference = found.references[name]
    pairs = itertools.zip_longest(output.token_ids, reference)
    differ = [n for n, (one, other) in enumerate(pairs) if one != other]
    found.compared += len(reference)
    found.wrong += len(differ)
    if differ:
        found.first_differences.append((name, differ[0], prompt_tokens))


async def _sum(client: Client, counter: str) -> float:
    return sum([await client.engine_metric(name, counter) for name in INSTANCES])
