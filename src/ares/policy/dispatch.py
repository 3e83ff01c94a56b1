"""Dispatch: which decode instance a request enters first."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from ares.policy.cluster import Cluster, IntArray


class Dispatch(Protocol):
    """Chooses an instance; the object may keep a cursor, so make one per gateway."""

    def __call__(self, cluster: Cluster, prompt_tokens: int) -> int | None:
        """Return the index of the chosen instance, or None where none is open."""
        ...


def round_robin_choice(cursor: int, closed: IntArray) -> int:
    """Return the first instance at or after the cursor, around the ring, that is not closed; -1 where all are."""
    count = len(closed)
    for step in range(count):
        instance = (cursor + step) % count
        if closed[instance] == 0:
            return instance
    return -1


def least_loaded_choice(load: IntArray, capacity: IntArray, closed: IntArray, tokens: int) -> int:
    """Return the instance with the smallest share of KV in use after `tokens` have entered; -1 where all are closed."""
    best, best_share = -1, np.inf
    for instance in range(len(load)):
        share = (load[instance] + tokens) / max(capacity[instance], 1)
        if closed[instance] == 0 and share < best_share:
            best, best_share = instance, share
    return best


class RoundRobin:
    """Open instances in turn: equal counts, blind to load. The static baseline."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, cluster: Cluster, prompt_tokens: int) -> int | None:
        """Return the next open instance after the last one chosen."""
        index = round_robin_choice(self._next, (~cluster.open).astype(np.int64))
        if index < 0:
            return None
        self._next = index + 1
        return index


class LeastLoaded:
    """The open instance with the smallest share of its KV in use after the request has entered."""

    def __call__(self, cluster: Cluster, prompt_tokens: int) -> int | None:
        """Return the index of the least loaded open instance."""
        if not cluster.open.any():
            return None
        share = (cluster.load_tokens() + prompt_tokens) / np.maximum(cluster.capacity_tokens, 1)
        return int(np.argmin(np.where(cluster.open, share, np.inf)))


DISPATCHERS: dict[str, Callable[[], Dispatch]] = {"round_robin": RoundRobin, "least_loaded": LeastLoaded}


def dispatcher(name: str) -> Dispatch:
    """Make the dispatcher called `name`; ValueError lists the known names."""
    if name not in DISPATCHERS:
        raise ValueError(f"unknown dispatch {name!r}; known: {', '.join(sorted(DISPATCHERS))}")
    return DISPATCHERS[name]()
