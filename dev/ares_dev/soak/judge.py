"""Whether what was watched stays flat."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ares_dev.soak.samples import Sample

# A slope is taken over at most so many points: the number of pairs is the square of it.
_POINTS = 400


@dataclass(frozen=True, slots=True)
class Bound:
    """How much a figure may grow in the judged half of a run: `absolute`, or a share of its median if that is more.

    `resting`: only samples count at which no request ran; with requests it follows their number.
    """

    absolute: float
    share: float = 0.0
    resting: bool = True


# Allocators give back and take again: below this, memory says nothing. Of a gateway, 8 MB in a second half of
# 15 minutes are a few kilobytes for each of its requests.
_MEMORY = Bound(8.0, 0.01, resting=False)
# Kept-alive connections between gateway and prefill instance come and go by the minute.
_CONNECTIONS = Bound(8.0)
# asyncio and thread pools start what they need when they first need it, up to a limit.
_THREADS = Bound(2.0)
# Whoever looks is served by some.
_TASKS = Bound(3.0)
# Everything else is counted one by one, and is back where it was when nothing runs.
_EXACT = Bound(0.0)
BOUNDS = {
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
        At least two points; of more than 400, every so manieth is taken.
    """
    step = -(-len(times) // _POINTS)
    t, v = np.asarray(times, float)[::step], np.asarray(values, float)[::step]
    first, second = np.triu_indices(len(t), 1)
    return float(np.median((v[second] - v[first]) / (t[second] - t[first])))


def series(samples: list[Sample], name: str, *, resting: bool) -> tuple[list[float], list[float]]:
    """Return times and values of a figure."""
    kept = [each for each in samples if name in each.values and (each.resting or not resting)]
    return [each.at_s for each in kept], [each.values[name] for each in kept]


def verdicts(samples: list[Sample], since_s: float) -> list[dict[str, Any]]:
    """Judge every figure by its samples from `since_s` on.

    Returns
    -------
    One row a figure: median, growth over the judged samples by the slope, the bound, and whether it is `flat`; None
    where fewer than three samples can be judged.
    """
    late = [each for each in samples if each.at_s >= since_s]
    rows: list[dict[str, Any]] = []
    for name in sorted({name for each in late for name in each.values}):
        bound = BOUNDS.get(name.rpartition("/")[2], _EXACT)
        times, values = series(late, name, resting=bound.resting)
        row: dict[str, Any] = {"series": name, "samples": len(values), "only_at_rest": bound.resting, "flat": None}
        if len(values) >= 3:
            per_s = slope(times, values)
            middle = float(np.median(values))
            growth, most = per_s * (times[-1] - times[0]), max(bound.absolute, bound.share * middle)
            row |= {
                "median": round(middle, 2),
                "growth": round(growth, 3),
                "growth_per_hour": round(3600 * per_s, 3),
                "bound": round(most, 2),
                "flat": growth <= most,
            }
        rows.append(row)
    return rows
