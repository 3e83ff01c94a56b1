"""Requests whose outputs are known from a run without moves; they must be the same while everything moves."""

import asyncio
import random
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from ares.bench import sse
from ares.bench.live.load import random_prompt

# Longest output that is known; requests ask for as many tokens or fewer.
KNOWN_TOKENS = 160
# Tokens that are compared after a difference, to find its kind.
_COMPARED = 6

Verdict = Literal["right", "short", "lost", "doubled", "other"]
Outputs = dict[int, list[int]]
"""Tokens by choice."""

_TEXTS = (
    "Tell me how bread is made.",
    "Explain to a child why the sky is blue, and why it is red in the evening. Take your time, and give examples.",
)


@dataclass(frozen=True, slots=True)
class Case:
    """A request without its length; its output is a function of it."""

    name: str
    body: dict[str, Any]

    @property
    def route(self) -> str:
        """Where it is sent."""
        return "chat/completions" if "messages" in self.body else "completions"

    def body_for(self, model: str, tokens: int, *, stream: bool) -> dict[str, Any]:
        """Return the whole body."""
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        fixed = {"model": model, "max_tokens": tokens, "ignore_eos": True, "return_token_ids": True}
        return {**self.body, **fixed, **options}


def cases(seed: int = 3) -> list[Case]:
    """Return chats and completions, short and long, greedy, seeded and with penalties, of one choice and of two."""
    generator = random.Random(seed)  # noqa: S311 - a workload, not a secret

    def prompt(tokens: int) -> dict[str, Any]:
        return {"prompt": random_prompt(generator, tokens)}

    greedy = {"temperature": 0}
    sampled = {"temperature": 1.0, "top_p": 0.95}
    penalties = {"frequency_penalty": 0.7, "presence_penalty": 0.4}
    made = {
        "short": {**prompt(24), **greedy},
        "one-block": {**prompt(127), **greedy},
        "medium": {**prompt(300), **greedy},
        "long": {**prompt(1100), **greedy},
        "chat-short": {"messages": [{"role": "user", "content": _TEXTS[0]}], **greedy},
        "chat-long": {"messages": [{"role": "user", "content": " ".join(_TEXTS * 12)}], **greedy},
        "seeded": {**prompt(80), **sampled, "seed": 17},
        "chat-seeded": {"messages": [{"role": "user", "content": _TEXTS[1]}], **sampled, "seed": 4},
        "penalties": {**prompt(60), **greedy, **penalties},
        "seeded-penalties": {**prompt(200), **sampled, **penalties, "seed": 23},
        "repetition": {**prompt(90), **greedy, "repetition_penalty": 1.2},
        "two-choices": {**prompt(150), **sampled, "seed": 8, "n": 2},
    }
    return [Case(name, body) for name, body in made.items()]


async def request_whole(http: aiohttp.ClientSession, url: str, model: str, case: Case, tokens: int) -> Outputs:
    """Return a whole reply; RuntimeError where it is an error."""
    async with http.post(f"{url}/v1/{case.route}", json=case.body_for(model, tokens, stream=False)) as answer:
        reply = sse.decode(await answer.read())
    if reply.error is not None or not reply.choices:
        raise RuntimeError(f"{case.name}: {reply.error}")
    return {choice.index: choice.token_ids or [] for choice in reply.choices}


async def reference_outputs(http: aiohttp.ClientSession, url: str, model: str, of: list[Case]) -> dict[str, Outputs]:
    """Return the output of each case."""
    outputs = await asyncio.gather(*(request_whole(http, url, model, case, KNOWN_TOKENS) for case in of))
    return {case.name: output for case, output in zip(of, outputs, strict=True)}


def compare(got: list[int], expected: list[int]) -> Verdict:
    """Say what became of an output: `right`, or the kind of its first difference.

    `short`: it ended too early; `lost`: one or more tokens are missing; `doubled`: some are repeated; `other`: tokens
    that are nowhere near in the expected output.
    """
    for n, token in enumerate(got[: len(expected)]):
        if token != expected[n]:
            return _difference(got[n : n + _COMPARED], expected, n)
    if len(got) < len(expected):
        return "short"
    return "right" if len(got) == len(expected) else "doubled"


def _difference(rest: list[int], expected: list[int], at: int) -> Verdict:
    """Look for the differing tokens in the expected output: after their place, or before."""
    for away in range(1, _COMPARED + 1):
        if rest == expected[at + away : at + away + len(rest)]:
            return "lost"
        start = at - away
        if start >= 0 and rest == expected[start : start + len(rest)]:
            return "doubled"
    return "other"
