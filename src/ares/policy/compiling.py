"""Compile the inner loops of policies where numba is installed; without it they run as plain Python."""

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

import ares

Function = TypeVar("Function", bound=Callable[..., Any])


@lru_cache(maxsize=1)
def cache_directory() -> str:
    """Return the folder of compiled code, named by the sources that it was compiled from.

    Numba checks the file of a function only, not the files of what it calls, so code compiled from one file could run
    with an old version of another.
    """
    digest = hashlib.sha256()
    root = Path(ares.__file__).parent
    for source in sorted([*root.glob("policy/**/*.py"), *root.glob("simulator/*.py")]):
        text = source.read_bytes()
        if b"compiled" in text or b"numba" in text or source.stem == "state":
            digest.update(text)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return str(base / "ares" / f"numba-{digest.hexdigest()[:16]}")


@lru_cache(maxsize=1)
def compiles() -> bool:
    """Return whether numba is installed, without importing it, which takes half a second."""
    return find_spec("numba") is not None


def keep_memory() -> None:
    """Let the C library keep the memory of a decision's arrays for the next decision.

    glibc gives every array above 128 KB back to the system until it has once freed a larger one; at 1,024 instances
    half of a decision's time went into pages that came back as zeros. So free one of 16 MB, never touched.
    """
    np.empty(1 << 21)


def compiled(function: Function) -> Function:
    """Compile to machine code on the first call, and keep the result for the next process.

    A module that uses this decorator imports numba when it is imported: import it where it is needed.

    Write loops instead of assigning an array to a part of another one: numba compiles the text of its error about
    shapes, with its strings, into every function that contains such an assignment.
    """
    return _compile(function)


def inlined(function: Function) -> Function:
    """Compile a function into each that calls it.

    For what has one caller, or is small: numba optimises every function that is not inlined together with all that it
    calls, and all that those call, and does so again for each function above it. A chain of calls costs the square of
    its length. Numba also passes a tuple of arrays field by field, and compiling functions that pass many to each other
    takes four times as long as compiling one that contains them all.
    """
    return _compile(function, inline="always")


def _compile(function: Function, **options: str) -> Function:
    try:
        import numba
    except ImportError:
        return function
    config: Any = numba.config
    before = config.CACHE_DIR
    config.CACHE_DIR = cache_directory()
    try:
        return cast(Function, numba.njit(cache=True, no_cfunc_wrapper=True, **options)(function))
    except RuntimeError:  # nowhere to keep compiled code: a read-only installation without a home
        return cast(Function, numba.njit(no_cfunc_wrapper=True, **options)(function))
    finally:
        config.CACHE_DIR = before
