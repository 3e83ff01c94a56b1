"""Percentiles and intervals of what was measured: one definition for all benchmarks."""

import random
import statistics
from collections.abc import Sequence

import numpy as np


def percentiles(values: Sequence[float], *points: float) -> dict[str, float]:
    """Return percentiles by name, interpolated linearly: 50 as `p50`, 100 as `max`; an empty mapping without values."""
    if not len(values):
        return {}
    found = np.percentile(values, points)
    return {"max" if point == 100 else f"p{point:g}": float(value) for point, value in zip(points, found, strict=True)}


def milliseconds(seconds: Sequence[float], *points: float, digits: int = 1) -> dict[str, float]:
    """Return percentiles of times in seconds, in milliseconds, rounded."""
    return {name: round(1000 * value, digits) for name, value in percentiles(seconds, *points).items()}


def median_interval(values: Sequence[float]) -> dict[str, float]:
    """Return the median and its 95 % bootstrap interval: `median`, `low`, `high`."""
    generator = random.Random(0)  # noqa: S311 - resampling
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(2000))
    return {"median": statistics.median(values), "low": medians[50], "high": medians[1949]}
