"""`longest_prefix`: the prefill instance with most of the prompt cached, for comparison.

After routers by prefix (SGLang's cache-aware policy, v0.4: sgl-model-gateway): the longest match where it is a large
enough share of the prompt and the load is even enough, the fewest requests otherwise.
"""

from dataclasses import dataclass

import numpy as np

from ares.policy.prefill.base import InTurns, Places, register
from ares.policy.settings import in_range


@dataclass(frozen=True, slots=True)
class LongestPrefixSettings:
    """Settings, with SGLang's defaults.

    Attributes
    ----------
    threshold
        Least share of the prompt that must be cached.
    balance_requests, balance_ratio
        The load is uneven where the most requests on an instance exceed the fewest by more than so many, and by more
        than this factor.
    """

    threshold: float = 0.3
    balance_requests: int = 64
    balance_ratio: float = 1.5

    def __post_init__(self) -> None:
        in_range(self, threshold=1.0)


@register("longest_prefix")
class LongestPrefix(InTurns):
    """The longest cached prefix."""

    Settings = LongestPrefixSettings
    sees_prefixes = True

    def choose(self, places: Places, tokens: int) -> int | None:
        """Return the index of the instance with the longest match, or with the fewest requests."""
        able = places.open & ~places.decodes
        if not able.any():
            return None
        settings, requests = self.settings, places.requests + places.decoding
        most, fewest = int(requests[able].max()), int(requests[able].min())
        uneven = most - fewest > settings.balance_requests and most > settings.balance_ratio * fewest
        cached = places.cached_tokens
        if uneven or cached[able].max() < settings.threshold * tokens:
            return self.best(places, able, requests)
        return self.best(places, able, np.negative(cached), requests)
