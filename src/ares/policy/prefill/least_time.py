"""`least_time`: the place where the prompt is computed soonest, what it costs others counted.

Its time at a prefill instance is that of all queued prompts, of its own tokens that are not cached there, and of their
transfer. A decode instance needs no transfer. Where requests are decoded, each of them waits for the prompt's tokens;
a decode instance computes a prompt only where its steps stay within the objective of time per token.
"""

from dataclasses import dataclass

import numpy as np

from ares.policy.cluster import FloatArray
from ares.policy.prefill.base import InTurns, Places, register
from ares.policy.settings import in_range


@dataclass(frozen=True, slots=True)
class LeastTimeSettings:
    """Settings.

    Attributes
    ----------
    on_decode
        Whether decode instances may compute prompts.
    delay_weight
        What a second counts by which a running request is delayed, relative to one of the first token's.
    work_weight
        What a second of work on a prefill instance counts beyond its own, for each prompt that at least half of them
        have: where all have a queue, every prompt that comes later waits for it. 0: not at all, and under overload less
        of what is cached is found.
    eviction_weight
        What a second of work counts beyond its own, because the KV that it computes takes the place of other cached KV.
    """

    on_decode: bool = True
    delay_weight: float = 0.2
    work_weight: float = 5.0
    eviction_weight: float = 0.5

    def __post_init__(self) -> None:
        in_range(self)


@register("least_time")
class LeastTime(InTurns):
    """The least time to the first token."""

    Settings = LeastTimeSettings
    sees_prefixes = True

    def choose(self, places: Places, tokens: int) -> int | None:
        """Return the index of the place with the least cost."""
        own_s = np.maximum(tokens - places.cached_tokens, 1) * places.token_s
        queued_s = places.queued_tokens * places.token_s
        within = self.settings.on_decode & (queued_s + own_s <= places.slack_s)
        able = places.open & (~places.decodes | within)
        if not able.any():
            able = places.open
        return self.best(places, able, self._cost(places, own_s, queued_s, tokens))

    def _cost(self, places: Places, own_s: FloatArray, queued_s: FloatArray, tokens: int) -> FloatArray:
        """Return seconds, shape (N,)."""
        held = places.cached_tokens[places.decodes]
        to_move = tokens - (int(held.max()) if len(held) else 0)
        overhead_s = np.where(
            places.decodes, places.step_s, places.base_s * (1 + places.requests) + to_move * places.transfer_s
        )
        # The median, and not the mean: a long queue at the one instance that holds a prefix must not draw more prompts
        # there while others are idle.
        prefilling = np.sort(places.requests[places.open & ~places.decodes])
        waiting = int(prefilling[(len(prefilling) - 1) // 2]) if len(prefilling) else 0
        settings = self.settings
        behind = np.where(places.decodes, 0, waiting)
        others = settings.eviction_weight + settings.work_weight * behind + settings.delay_weight * places.decoding
        cost: FloatArray = queued_s + overhead_s + (1.0 + others) * own_s
        return cost
