"""Whether memory, descriptors, tasks and counters grow over a soak."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ares_dev.soak.samples import Sample

# A slope is taken over at most this many points: the number of pairs is the square of it.
_POINTS = 400


@dataclass(frozen=True, slots=True)
class GrowthLimit:
    """How much a figure may grow in the judged half of a run: `absolute`, or a share of its median if that is more.

    `idle`: only samples without running requests count, for a figure that follows their number.
    """

    absolute: float
    share: float = 0.0
    idle: bool = True


# Allocators return and take memory all the time: less than this means nothing. At a gateway, 8 MB in a second half of
# 15 minutes are a few kilobytes for each of its requests.
_MEMORY = GrowthLimit(8.0, 0.01, idle=False)
# Kept-alive connections between gateway and instances come and go by the minute.
_CONNECTIONS = GrowthLimit(8.0)
# asyncio and thread pools start threads when they first need them, up to a limit.
_THREADS = GrowthLimit(2.0)
# The requests that take a sample run in some of them.
_TASKS = GrowthLimit(3.0)
# Everything else is counted exactly, and returns to its value when nothing runs.
_EXACT = GrowthLimit(0.0)
LIMITS = {
    "rss_mb": _MEMORY,
    "pss_mb": _MEMORY,
    "descriptors": _CONNECTIONS,
    "sockets": _CONNECTIONS,
    "threads": _THREADS,
    "tasks": _TASKS,
}


def slope(times: Any, values: Any) -> float:
    """Return the median of the slopes between all pairs of points (Theil and Sen): a few outliers do not move it.

    Parameters
    ----------
    times, values
        At least two points; of more than 400, a regular subset is used.
    """
    step = -(-len(times) // _POINTS)
    t, v = np.asarray(times, float)[::step], np.asarray(values, float)[::step]
    first, second = np.triu_indices(len(t), 1)
    return float(np.median((v[second] - v[first]) / (t[second] - t[first])))


def series(samples: list[Sample], name: str, *, idle: bool) -> tuple[list[float], list[float]]:
    """Return times and values of a figure."""
    kept = [each for each in samples if name in each.values and (each.idle or not idle)]
    return [each.at_s for each in kept], [each.values[name] for each in kept]


def judge_growth(samples: list[Sample], since_s: float) -> list[dict[str, Any]]:
    """Judge the growth of every figure by its samples from `since_s` on.

    Returns
    -------
    One row a figure: median, growth over the judged samples by the slope, the limit, and whether it is `flat`; None
    where fewer than three samples can be judged.
    """
    late = [each for each in samples if each.at_s >= since_s]
    rows: list[dict[str, Any]] = []
    for name in sorted({name for each in late for name in each.values}):
        limit = LIMITS.get(name.rpartition("/")[2], _EXACT)
        times, values = series(late, name, idle=limit.idle)
        row: dict[str, Any] = {"series": name, "samples": len(values), "only_when_idle": limit.idle, "flat": None}
        if len(values) >= 3:
            per_s = slope(times, values)
            middle = float(np.median(values))
            growth, most = per_s * (times[-1] - times[0]), max(limit.absolute, limit.share * middle)
            row |= {
                "median": round(middle, 2),
                "growth": round(growth, 3),
                "growth_per_hour": round(3600 * per_s, 3),
                "limit": round(most, 2),
                "flat": growth <= most,
            }
        rows.append(row)
    return rows
