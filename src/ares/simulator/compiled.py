"""Numba's compiler with types that a checker can read, and the two queues that the event loop needs."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

import ares
import ares.simulator.pointer

Function = TypeVar("Function", bound=Callable[..., Any])


def _cache_directory() -> Path:
    """Directory of compiled code, named by the sources that it was compiled from.

    Numba checks only the file of a function, not the files of what it calls, so code compiled from one file could
    run with an old version of another.
    """
    digest = hashlib.sha256()
    root = Path(ares.__file__).parent
    names = ("admission", "dispatch", "forecast", "kernels", "queue", "suspend")
    rules = [root / "policy" / f"{name}.py" for name in names]
    for source in [*rules, *sorted((root / "simulator").glob("*.py"))]:
        text = source.read_bytes()
        if source in rules or b"@compiled" in text or source.stem in ("state", "pointer"):
            digest.update(text)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ares" / f"numba-{digest.hexdigest()[:16]}"


_CACHE = str(_cache_directory())


def compiled(function: Function) -> Function:
    """Compile to machine code on the first call and keep the result for the next process."""
    config: Any = numba.config
    before = config.CACHE_DIR
    config.CACHE_DIR = _CACHE
    try:
        return cast(Function, numba.njit(cache=True)(function))
    finally:
        config.CACHE_DIR = before


@compiled
def heap_push(keys: NDArray[np.float64], items: NDArray[np.int64], size: int, key: float, item: int) -> int:
    """Push onto a binary heap ordered by (key, item); return the new size."""
    at = size
    while at > 0:
        parent = (at - 1) // 2
        if keys[parent] < key or (keys[parent] == key and items[parent] <= item):
            break
        keys[at], items[at] = keys[parent], items[parent]
        at = parent
    keys[at], items[at] = key, item
    return size + 1


@compiled
def heap_pop(keys: NDArray[np.float64], items: NDArray[np.int64], size: int) -> int:
    """Drop the first of a binary heap (read it before); return the new size."""
    size -= 1
    key, item = keys[size], items[size]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        right = child + 1
        if right < size and (keys[right] < keys[child] or (keys[right] == keys[child] and items[right] < items[child])):
            child = right
        if key < keys[child] or (key == keys[child] and item <= items[child]):
            break
        keys[at], items[at] = keys[child], items[child]
        at = child
    keys[at], items[at] = key, item
    return size


@compiled
def tree_set(tree: NDArray[np.float64], leaf: int, time: float) -> None:
    """Set one leaf of a tournament tree of times; its root then holds the earliest."""
    half = len(tree) // 2
    at = half + leaf
    tree[at] = time
    at //= 2
    while at >= 1:
        tree[at] = min(tree[2 * at], tree[2 * at + 1])
        at //= 2


@compiled
def tree_first(tree: NDArray[np.float64]) -> int:
    """Return the leaf with the earliest time, the lowest index among equals."""
    half = len(tree) // 2
    at = 1
    while at < half:
        at = 2 * at if tree[2 * at] <= tree[2 * at + 1] else 2 * at + 1
    return at - half
