"""Synthetic workloads: Poisson arrivals with lengths from a named mix.

`paper` matches what arXiv 2510.13668 states for ShareGPT prompts on DeepSeek-R1-Distill-Qwen-7B: 29.2 % of the outputs
under 1K tokens, 17.3 % over 30K, a cap of 32K. The paper gives no more; between these points the mix is log-uniform.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ares.traces.workload import Workload

IntArray = NDArray[np.int64]
Sampler = Callable[[np.random.Generator, int], tuple[IntArray, IntArray]]


def _prompts(random: np.random.Generator, count: int, median: float, spread: float, cap: int) -> IntArray:
    return np.clip(random.lognormal(np.log(median), spread, count), 4, cap).astype(np.int64)


def _paper(random: np.random.Generator, count: int) -> tuple[IntArray, IntArray]:
    """29.2 % in 64..1,000, 53.5 % in 1,000..30,000 (both log-uniform), 17.3 % in 30,000..32,000 (uniform)."""
    part = random.random(count)
    short = np.exp(random.uniform(np.log(64), np.log(1000), count))
    middle = np.exp(random.uniform(np.log(1000), np.log(30000), count))
    tail = random.uniform(30000, 32000, count)
    output = np.where(part < 0.292, short, np.where(part < 0.292 + 0.535, middle, tail))
    return _prompts(random, count, 180.0, 1.0, 4096), output.astype(np.int64)


def _chat(random: np.random.Generator, count: int) -> tuple[IntArray, IntArray]:
    """Short answers: lognormal, median 180, cap 2,048."""
    output = np.clip(random.lognormal(np.log(180), 0.8, count), 1, 2048)
    return _prompts(random, count, 700.0, 1.0, 16384), output.astype(np.int64)


def _uniform(random: np.random.Generator, count: int) -> tuple[IntArray, IntArray]:
    """All equal: 512 prompt and 1,024 output tokens; nothing to predict and nothing to balance."""
    return np.full(count, 512, np.int64), np.full(count, 1024, np.int64)


WORKLOADS: dict[str, Sampler] = {"paper": _paper, "chat": _chat, "uniform": _uniform}


def synthetic(name: str, count: int, seed: int, rate: float = 1.0) -> Workload:
    """Draw a workload.

    Parameters
    ----------
    name
        One of `WORKLOADS`; ValueError lists the known names.
    count
        Number of requests, at least 1.
    seed
        The same seed gives the same workload.
    rate
        Mean arrivals per second (Poisson).
    """
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; known: {', '.join(WORKLOADS)}")
    if count < 1 or rate <= 0:
        raise ValueError(f"a workload needs at least one request and a positive rate, not {count} and {rate}")
    random = np.random.default_rng(seed)
    arrival = np.cumsum(random.exponential(1.0 / rate, count))
    prompt, output = WORKLOADS[name](random, count)
    return Workload(f"{name} ({count} requests, seed {seed})", arrival - arrival[0], prompt, output)
