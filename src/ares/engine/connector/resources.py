"""Counts of the objects that the connector's two sides hold in addition to KV blocks, to find leaks.

The two sides see each other's counts where they live in one process: with one worker, as on CPUs. Otherwise only the
scheduler's side is counted.
"""

from collections.abc import Callable

_counters: dict[str, Callable[[], dict[str, int]]] = {}


def register(side: str, count: Callable[[], dict[str, int]]) -> None:
    """Register the counts of a side in this process; `count` is called on another thread and must only read."""
    _counters[side] = count


def count() -> dict[str, int]:
    """Return how many objects there are, by ``side.kind``."""
    return {f"{side}.{kind}": number for side, read in _counters.items() for kind, number in read().items()}
