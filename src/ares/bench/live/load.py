"""What is asked of the cluster: the same requests at the same moments for every preset."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ares.predictor import prompts
from ares.traces import Workload

# Ordinary token ids of the default model's vocabulary.
_IDS = range(1000, 40000)


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: `at_s` seconds from the start, `body` for `/v1/completions` or, with messages, the chat route."""

    name: str
    at_s: float
    body: dict[str, Any]


def from_prompts(
    files: list[Path], count: int, rate: float, limit: int, seed: int, note: Callable[[str], None]
) -> list[Planned]:
    """Return chats with real prompts, greedy so that every run writes the same; arrivals are Poisson.

    `note` is told what of the files is not read.

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
    """Return a workload's requests for simulated engines, which are told the true lengths; their gateway is not."""
    generator = np.random.default_rng(seed)
    limit = int(work.output_tokens.max())  # the same for all: the gateway learns no length from it
    planned = []
    for number in range(len(work)):
        body = {
            "prompt": generator.integers(_IDS.start, _IDS.stop, int(work.prompt_tokens[number])).tolist(),
            "max_tokens": limit,
            "vllm_xargs": {"ares_mock_output_tokens": int(work.output_tokens[number])},
        }
        planned.append(Planned(f"r{number}", float(work.arrival_s[number]), body))
    return planned


def renamed(planned: list[Planned], prefix: str) -> list[Planned]:
    """Return the same requests under other names, so that those of two rounds are told apart."""
    return [replace(each, name=prefix + each.name) for each in planned]
