"""What the engine's parts hold beside KV blocks, counted for whoever looks for leaks: `GET /ares/v1/resources`.

Only on CPUs do the parts live in one process with the HTTP server (engine/launcher.py); elsewhere the answer is empty.
"""

from collections.abc import Callable

_counters: dict[str, Callable[[], dict[str, int]]] = {}


def register(part: str, count: Callable[[], dict[str, int]]) -> None:
    """Let `count` say what a part of this process holds; it is called on another thread, and must only read."""
    _counters[part] = count


def count() -> dict[str, dict[str, int]]:
    """Return what each part holds."""
    return {part: read() for part, read in _counters.items()}
