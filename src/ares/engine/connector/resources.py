"""What the connector's two sides hold beside KV blocks, counted for whoever looks for leaks.

They know each other where they live in one process: with one worker, as on CPUs. Otherwise only the scheduler's side is
counted.
"""

from collections.abc import Callable

_counters: dict[str, Callable[[], dict[str, int]]] = {}


def register(side: str, count: Callable[[], dict[str, int]]) -> None:
    """Let `count` say what a side holds in this process; it is called on another thread, and must only read."""
    _counters[side] = count


def count() -> dict[str, int]:
    """Return how many of what are held, by side and name."""
    return {f"{side}.{what}": number for side, read in _counters.items() for what, number in read().items()}
