"""`least_loaded`: the open instance with the smallest share of its KV in use after the request has entered."""

import numpy as np

from ares.policy.cluster import Cluster, FloatArray, IntArray
from ares.policy.dispatch.base import LEAST_LOADED, Dispatch, register


def least_loaded_choice(load: IntArray, capacity: IntArray, closed: IntArray, tokens: int) -> int:
    """Return the instance with the smallest share of KV in use after `tokens` have entered; -1 where all are closed."""
    best, best_share = -1, np.inf
    for instance in range(len(load)):
        share = (load[instance] + tokens) / max(capacity[instance], 1)
        if closed[instance] == 0 and share < best_share:
            best, best_share = instance, share
    return best


@register("least_loaded")
class LeastLoaded(Dispatch):
    """The smallest share of KV in use."""

    rule = LEAST_LOADED
    quick = True

    def choose(self, cluster: Cluster, tokens: int, remaining: FloatArray | None) -> int | None:
        """Return the index of the least loaded open instance."""
        if not cluster.open.any():
            return None
        share = (cluster.load_tokens() + tokens) / np.maximum(cluster.capacity_tokens, 1)
        return int(np.argmin(np.where(cluster.open, share, np.inf)))
