"""`round_robin`: open instances in turn, whatever their load: the static baseline."""

from collections.abc import Mapping

import numpy as np

from ares.policy.cluster import Cluster, FloatArray, IntArray
from ares.policy.dispatch.base import ROUND_ROBIN, Dispatch, register


def round_robin_choice(cursor: int, closed: IntArray) -> int:
    """Return the first instance at or after the cursor, around the ring, that is not closed; -1 where all are."""
    count = len(closed)
    for step in range(count):
        instance = (cursor + step) % count
        if closed[instance] == 0:
            return instance
    return -1


@register("round_robin")
class RoundRobin(Dispatch):
    """The next open instance after the last one chosen."""

    rule = ROUND_ROBIN
    quick = True
    _next = 0

    def choose(self, cluster: Cluster, tokens: int, remaining: FloatArray | None) -> int | None:
        """Return the next open instance."""
        index = round_robin_choice(self._next, (~cluster.open).astype(np.int64))
        if index < 0:
            return None
        self._next = index + 1
        return index

    def memory(self) -> dict[str, float]:
        """Return the index from which the next choice starts."""
        return {"next": self._next}

    def remember(self, memory: Mapping[str, float]) -> None:
        """Start the next choice from there."""
        self._next = int(memory["next"])
