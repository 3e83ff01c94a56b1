"""The load of `ares bench live`: the same requests at the same moments for every preset."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ares.predictor import prompts
from ares.protocol.fields import MOCK_OUTPUT_TOKENS
from ares.traces import Workload

# Ordinary tokens of any model: special tokens and single bytes come first, and the smallest vocabularies end here.
_IDS = range(300, 1000)


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: `at_s` seconds from the start, `body` for `/v1/completions` or, with messages, the chat route."""

    name: str
    at_s: float
    body: dict[str, Any]


def random_prompt(generator: random.Random, tokens: int) -> list[int]:
    """Return a prompt of ordinary token ids that no prefix cache has seen."""
    return [generator.randrange(_IDS.start, _IDS.stop) for _ in range(tokens)]


def from_prompts(
    files: list[Path], count: int, rate: float, limit: int, seed: int, note: Callable[[str], None]
) -> list[Planned]:
    """Return chats with real prompts, greedy so that every run writes the same; arrivals are Poisson.

    `note` is called with what is left out of the files.

    Raises
    ------
    PredictorError
        A file holds no prompts.
    """
    texts = [prompt.text for prompt in prompts.read(files, seed, note)]
    generator = random.Random(seed)  # noqa: S311 - a workload, not a secret
    planned, at = [], 0.0
    for number in range(count):
        at += generator.expovariate(rate)
        messages = [{"role": "user", "content": texts[number % len(texts)]}]
        planned.append(Planned(f"r{number}", at, {"messages": messages, "temperature": 0, "max_tokens": limit}))
    return planned


def from_workload(work: Workload, seed: int) -> list[Planned]:
    """Return a workload's requests for mock engines, which get the true lengths; their gateway does not."""
    generator = np.random.default_rng(seed)
    limit = int(work.output_tokens.max())  # the same for all: the gateway learns no length from it
    planned = []
    for number in range(len(work)):
        body = {
            "prompt": generator.integers(_IDS.start, _IDS.stop, int(work.prompt_tokens[number])).tolist(),
            "max_tokens": limit,
            "vllm_xargs": {MOCK_OUTPUT_TOKENS: int(work.output_tokens[number])},
        }
        planned.append(Planned(f"r{number}", float(work.arrival_s[number]), body))
    return planned


def renamed(planned: list[Planned], prefix: str) -> list[Planned]:
    """Return the same requests under other names, so that those of two rounds differ."""
    return [replace(each, name=prefix + each.name) for each in planned]


def salted(planned: list[Planned], salt: str) -> list[Planned]:
    """Return the same requests with a cache salt: they find nothing cached that a run with another salt has left."""
    return [replace(each, body={**each.body, "cache_salt": salt}) for each in planned]


def order(presets: list[str], round_number: int) -> list[str]:
    """Return the presets in the order of a round: in as many rounds as there are, each comes once at each place."""
    first = round_number % len(presets)
    return presets[first:] + presets[:first]
