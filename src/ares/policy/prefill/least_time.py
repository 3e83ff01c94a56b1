"""`least_time`: the place where the prompt is computed soonest, what it costs others counted.

Its time at a prefill instance is that of all queued prompt tokens, of its own that are not cached there, and of their
transfer. A decode instance needs no transfer, but each of its running requests waits for the prompt's tokens; it
computes a prompt only where its steps stay within the objective of time per token.
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
        What a second of work counts beyond its own, for each prompt that waits on a prefill instance in the mean: the
        prompts that come meanwhile wait for it. 0: not at all, and under overload less of what is cached is found.
    """

    on_decode: bool = True
    delay_weight: float = 0.2
    work_weight: float = 3.0

    def __post_init__(self) -> None:
        in_range(self)


@register("least_time")
class LeastTime(InTurns):
    """The least time to the first token."""

    Settings = LeastTimeSettings
    sees_prefixes = True

    def choose(self, places: Places, tokens: int) -> int | None:
        """Return the index of the place with the least cost."""
        own_s = self._own_s(places, tokens)
        within = self.settings.on_decode & (own_s <= places.slack_s)
        able = places.open & (~places.decodes | within)
        if not able.any():
            able = places.open
        return self.best(places, able, self._cost(places, own_s, tokens))

    def _own_s(self, places: Places, tokens: int) -> FloatArray:
        uncached: FloatArray = np.maximum(tokens - places.cached_tokens, 1) * places.token_s
        return uncached

    def _cost(self, places: Places, own_s: FloatArray, tokens: int) -> FloatArray:
        """Return seconds, shape (N,)."""
        held = places.cached_tokens[places.decodes]
        to_move = tokens - (int(held.max()) if len(held) else 0)
        queue_s = places.queued_tokens * places.token_s
        prefill = places.base_s + to_move * places.transfer_s
        decode = places.step_s + self.settings.delay_weight * places.requests * own_s
        # Whoever comes while prompts are queued waits for this one's work too, wherever it is computed.
        prefilling = places.requests[~places.decodes]
        waiting = float(prefilling.mean()) if len(prefilling) else 0.0
        work_s = (1.0 + self.settings.work_weight * waiting) * own_s
        cost: FloatArray = queue_s + work_s + np.where(places.decodes, decode, prefill)
        return cost
