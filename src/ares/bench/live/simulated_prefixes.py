"""The hit rate that `ares simulate prefixes` finds for a run of conversations, next to the one that was measured.

The prompts are those that were sent, at the times at which they were sent: they have what was answered in them.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ares.bench.live.client import Observed
from ares.bench.live.conversations import Conversation
from ares.policy import prefill_policy, preset
from ares.simulator.prefix_caches import PrefillPool
from ares.simulator.profile import Profile, load_profile
from ares.traces.prompt_blocks import Prompt


@dataclass(frozen=True, slots=True)
class Simulated:
    """The prefill instances of a run: mock engines of a profile."""

    profile: Profile
    count: int

    @classmethod
    def of(cls, name: str, kv_tokens: int | None, count: int) -> "Simulated":
        """Return those of a profile by name or path, perhaps with another KV capacity; ProfileError as its reader."""
        profile = load_profile(name)
        if kv_tokens is not None:
            profile = profile.model_copy(update={"kv_tokens": kv_tokens})
        return cls(profile, count)

    def hit_rate(self, preset_name: str, load: Sequence[Conversation], seen: Sequence[Sequence[Observed]]) -> float:
        """Return the share of the prompts' tokens that is cached where the preset's prefill policy sends them.

        Decode is not simulated, so that no prompt is computed by a decode instance.
        """
        chosen = preset(preset_name)
        policy = prefill_policy(chosen.prefill, chosen.prefill_settings)
        prompts = sent_prompts(load, seen, self.profile.block_size)
        _, share = PrefillPool(prompts, self.profile.block_size, self.profile, self.count, policy).run()
        return share


def sent_prompts(load: Sequence[Conversation], seen: Sequence[Sequence[Observed]], block: int) -> list[Prompt]:
    """Return the prompts of the turns that were answered, by arrival, with the blocks that they are made of.

    Equal numbers are equal blocks behind equal beginnings, as in a trace.
    """

    @functools.cache
    def number(parent: int, tokens: tuple[int, ...]) -> int:
        return next(numbers)

    numbers = itertools.count(1)
    found = []
    for conversation, turns in zip(load, seen, strict=True):
        tokens = list(conversation.begins)
        for turn, answered in zip(conversation.turns, turns, strict=False):
            tokens += turn.new
            blocks = [0]
            for first in range(0, len(tokens) - block + 1, block):
                blocks.append(number(blocks[-1], tuple(tokens[first : first + block])))
            if answered.error is None:
                found.append(Prompt(answered.at_s, len(tokens), tuple(blocks[1:])))
            tokens += answered.tokens
    return sorted(found, key=lambda prompt: prompt.arrival_s)
