"""Prefill instances with prefix caches, in discrete events: prefill policies over a trace that names its blocks.

Prefill alone: each instance computes one prompt after the other, by the profile's step-time model, and keeps blocks by
least recent use. The policies are those of the live service. Decode is not simulated: it pulls KV, or has room.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ares.policy import Places, Prefill, choose_place, prefill_policy
from ares.policy.cluster import FloatArray
from ares.simulator.profile import Profile
from ares.traces.prompt_blocks import Prompt
from ares.traces.records import TraceError


@dataclass(slots=True)
class _Queued:
    """A prompt on an instance: its number, and the tokens that were thought to be uncached when it was sent."""

    number: int
    uncached: int


@dataclass(slots=True)
class Instance:
    """One prefill instance.

    Attributes
    ----------
    capacity
        Blocks that it can keep.
    cache
        The blocks, in the order of their use.
    sent
        Blocks of prompts that have been sent and not computed yet: how many prompts have each.
    free_at
        When it has computed the newest prompt that it has begun.
    """

    capacity: int
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    sent: Counter[int] = field(default_factory=Counter)
    queue: deque[_Queued] = field(default_factory=deque)
    running: _Queued | None = None
    free_at: float = 0.0

    def leading(self, blocks: Iterable[int], *, known: bool) -> int:
        """Return how many blocks it has, from the first on; with `known` also those that were sent."""
        count = 0
        for block in blocks:
            if block not in self.cache and not (known and self.sent[block] > 0):
                break
            count += 1
        return count

    def keep(self, blocks: tuple[int, ...]) -> None:
        """Keep blocks; a prompt's first ones are the last ones to leave."""
        for block in reversed(blocks):
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.capacity:
            self.cache.popitem(last=False)


class PrefillPool:
    """Prefill instances under one policy, over one trace.

    Parameters
    ----------
    prompts, block_tokens
        The trace.
    profile, count
        Of the instances.
    policy
        Chooses among them.
    """

    def __init__(self, prompts: list[Prompt], block_tokens: int, profile: Profile, count: int, policy: Prefill) -> None:
        self._prompts, self._block, self._profile, self._policy = prompts, block_tokens, profile, policy
        capacity = max(profile.kv_tokens // block_tokens, 1)
        self._instances = [Instance(capacity) for _ in range(count)]
        self._names = tuple(f"prefill-{n}" for n in range(count))
        self._first_token_s = np.zeros(len(prompts))
        self._cached = np.zeros(len(prompts), dtype=np.int64)

    def run(self) -> tuple[FloatArray, float]:
        """Return the seconds from each prompt's arrival to its end, shape (R,), and the share of tokens cached."""
        for number, prompt in enumerate(self._prompts):
            for instance in self._instances:
                self._advance(instance, prompt.arrival_s)
            places = self._places(prompt)
            chosen = choose_place(self._policy, places, prompt.tokens) or 0
            instance = self._instances[chosen]
            instance.queue.append(_Queued(number, prompt.tokens - int(places.cached_tokens[chosen])))
            instance.sent.update(prompt.blocks)
            self._advance(instance, prompt.arrival_s)
        for instance in self._instances:
            self._advance(instance, float("inf"))
        arrivals = np.array([prompt.arrival_s for prompt in self._prompts])
        share = float(self._cached.sum()) / sum(prompt.tokens for prompt in self._prompts)
        return self._first_token_s - arrivals, share

    def _cached_tokens(self, instance: Instance, prompt: Prompt, *, known: bool) -> int:
        blocks = min(instance.leading(prompt.blocks, known=known), (prompt.tokens - 1) // self._block)
        return blocks * self._block

    def _places(self, prompt: Prompt) -> Places:
        instances, count = self._instances, len(self._instances)
        sees = self._policy.sees_prefixes
        cached = [self._cached_tokens(i, prompt, known=True) if sees else 0 for i in instances]
        waiting = [[*i.queue, *([i.running] if i.running is not None else [])] for i in instances]
        none = np.zeros(count)
        return Places(
            instances=self._names,
            open=np.ones(count, dtype=np.bool_),
            requests=np.array([len(one) for one in waiting], dtype=np.int64),
            decoding=np.zeros(count, np.int64),
            cached_tokens=np.array(cached, dtype=np.int64),
            queued_tokens=np.array([sum(each.uncached for each in one) for one in waiting], dtype=np.int64),
            base_s=np.full(count, self._profile.step.base_s),
            token_s=np.full(count, self._profile.step.per_prefill_token_s),
            decodes=none.astype(np.bool_),
            step_s=none,
            slack_s=none,
        )

    def _advance(self, instance: Instance, now: float) -> None:
        """End and begin prompts up to this time."""
        while True:
            if instance.running is not None:
                if instance.free_at > now:
                    return
                prompt = self._prompts[instance.running.number]
                instance.keep(prompt.blocks)
                instance.sent.subtract(prompt.blocks)
                instance.running = None
            if not instance.queue:
                return
            begun = instance.queue[0]
            prompt = self._prompts[begun.number]
            start = max(instance.free_at, prompt.arrival_s)
            if start > now:
                return
            instance.running = instance.queue.popleft()
            cached = self._cached_tokens(instance, prompt, known=False)
            instance.free_at = start + prefill_s(self._profile, cached, prompt.tokens)
            self._cached[begun.number] = cached
            self._first_token_s[begun.number] = instance.free_at


def prefill_s(profile: Profile, cached: int, tokens: int) -> float:
    """Return the seconds that an instance takes for a prompt of which the first `cached` tokens are cached."""
    step, new = profile.step, tokens - cached
    chunks = -(-new // profile.max_num_batched_tokens)
    return (
        chunks * step.base_s + step.per_prefill_token_s * new + step.per_prefill_context_s * new * (cached + new / 2.0)
    )


def ideal_share(prompts: list[Prompt], block_tokens: int) -> float:
    """Return the share of tokens that one endless cache of all instances would have."""
    known, cached = set[int](), 0
    for prompt in prompts:
        count = next((n for n, block in enumerate(prompt.blocks) if block not in known), len(prompt.blocks))
        cached += min(count, (prompt.tokens - 1) // block_tokens) * block_tokens
        known.update(prompt.blocks)
    return cached / sum(prompt.tokens for prompt in prompts)


def at_load(prompts: list[Prompt], profile: Profile, count: int, load: float) -> list[Prompt]:
    """Return the prompts with other arrivals: load 1 keeps so many instances busy if nothing is cached.

    Raises
    ------
    TraceError
        All prompts arrive at once.
    """
    work = sum(prefill_s(profile, 0, prompt.tokens) for prompt in prompts) / count
    span = prompts[-1].arrival_s
    if span <= 0:
        raise TraceError("all prompts arrive at once, so that there is no load to change")
    scale = work / (load * span)
    return [Prompt(prompt.arrival_s * scale, prompt.tokens, prompt.blocks) for prompt in prompts]


def compare(
    prompts: list[Prompt], block_tokens: int, profile: Profile, count: int, policies: list[str], loads: list[float]
) -> dict[str, Any]:
    """Return hit rates, and median and 99th percentile of the time of a prefill, by load and policy."""
    runs = []
    for load in loads:
        arriving = at_load(prompts, profile, count, load)
        for name in policies:
            ttft, share = PrefillPool(arriving, block_tokens, profile, count, prefill_policy(name)).run()
            p50, p99 = np.percentile(ttft, [50, 99])
            runs.append(
                {"load": load, "prefill": name, "hit_rate": share, "ttft_s": {"p50": float(p50), "p99": float(p99)}}
            )
    return {"requests": len(prompts), "ideal_hit_rate": ideal_share(prompts, block_tokens), "runs": runs}
