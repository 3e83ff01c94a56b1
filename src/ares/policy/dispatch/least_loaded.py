"""`least_loaded`: the open instance with the smallest share of its KV in use after the request has entered."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ares.policy.cluster import Cluster, FloatArray, IntArray
from ares.policy.dispatch.base import LEAST_LOADED, Dispatch, register
from ares.policy.settings import in_range


def least_loaded_choice(load: IntArray, capacity: IntArray, closed: IntArray, tokens: int) -> int:
    """Return the instance with the smallest share of KV in use after `tokens` have entered; -1 where all are closed."""
    best, best_share = -1, np.inf
    for instance in range(len(load)):
        share = (load[instance] + tokens) / max(capacity[instance], 1)
        if closed[instance] == 0 and share < best_share:
            best, best_share = instance, share
    return best


@dataclass(frozen=True, slots=True)
class LeastLoadedSettings:
    """Settings.

    Attributes
    ----------
    cached_weight
        How much of the tokens that an instance has cached does not count as KV that enters: they need not be pulled,
        and take no memory beyond that of other requests with the same beginning. 0: all of them count.
    """

    cached_weight: float = 0.0

    def __post_init__(self) -> None:
        in_range(self, cached_weight=1.0)


@register("least_loaded")
class LeastLoaded(Dispatch):
    """The smallest share of KV in use."""

    Settings = LeastLoadedSettings
    rule = LEAST_LOADED
    quick = True

    @classmethod
    def sees_prefixes(cls, settings: Any) -> bool:
        """Return whether cached tokens count."""
        return bool(settings.cached_weight)

    def choose(self, cluster: Cluster, tokens: int, remaining: FloatArray | None) -> int | None:
        """Return the index of the least loaded open instance."""
        if not cluster.open.any():
            return None
        cached = 0 if cluster.cached_tokens is None else self.settings.cached_weight * cluster.cached_tokens
        share = (cluster.load_tokens() + tokens - cached) / np.maximum(cluster.capacity_tokens, 1)
        return int(np.argmin(np.where(cluster.open, share, np.inf)))
