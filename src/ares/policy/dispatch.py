"""Dispatch: which decode instance a request enters first."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from ares.policy.cluster import Cluster


class Dispatch(Protocol):
    """Chooses an instance; the object may keep a cursor, so make one per gateway."""

    def __call__(self, cluster: Cluster, prompt_tokens: int) -> int | None:
        """Return the index of the chosen instance, or None where none is open."""
        ...


class RoundRobin:
    """Open instances in turn: equal counts, blind to load. The static baseline."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, cluster: Cluster, prompt_tokens: int) -> int | None:
        """Return the next open instance after the last one chosen."""
        for step in range(len(cluster.instances)):
            index = (self._next + step) % len(cluster.instances)
            if cluster.open[index]:
                self._next = index + 1
                return index
        return None


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
