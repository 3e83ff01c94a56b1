"""The noise floor: the spread of sampled lengths when the model continues the same prefix many times.

From one prefix, with n continuations y_1 ... y_n, the least expected absolute error of any predictor is that of the
distribution's median, E|Y - m|. The sample's own median underestimates it (it has seen every y), the median of the
others (leave one out) overestimates it; both are reported, and `mae` is their mean, in which the errors of order 1/n
cancel. The least CRPS is that of the distribution itself, E|Y - Y'| / 2, which pairs of continuations estimate without
bias.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ares.predictor import metrics
from ares.predictor.dataset import Pairs
from ares.predictor.errors import PredictorError
from ares.predictor.metrics import Array
from ares.text_files import read_text


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prefix of a recorded output, and how much longer each continuation of it was.

    Attributes
    ----------
    remaining
        Tokens of each continuation; `room` where it reached the limit.
    """

    request: str
    position: int
    room: int
    remaining: tuple[int, ...]


def choose(pairs: Pairs, count: int, seed: int = 0, known: Sequence[Prefix] = ()) -> NDArray[np.int64]:
    """Return pairs of the test set, drawn at random: their mean errors are those of the whole set.

    `count` includes those that are `known` already, which are not drawn again.
    """
    rows = np.flatnonzero(pairs.split("test"))
    taken = {(p.request, p.position) for p in known}
    drawn = np.random.default_rng([seed, len(known)]).permutation(rows)
    fresh = [n for n in drawn.tolist() if (pairs.requests[pairs.output[n]], pairs.position[n]) not in taken]
    return np.array(fresh[: max(0, count - len(known))], np.int64)


def read(path: Path) -> tuple[list[Prefix], str]:
    """Return the prefixes that `ares predictor noise-floor` wrote, and how they were sampled.

    Raises
    ------
    PredictorError
        The file does not exist, or is not what that command writes.
    """
    try:
        content = json.loads(read_text(path))
        rows = content["prefixes"]
        return [Prefix(r["request"], r["position"], r["room"], tuple(r["remaining"])) for r in rows], content[
            "sampling"
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise PredictorError(f"{path}: not what ares predictor noise-floor writes: {error}") from error


def of_prefix(remaining: Sequence[int]) -> dict[str, float]:
    """Return the floor at one prefix: `mae_in_sample`, `mae_leave_one_out`, `mae` and `crps`."""
    values = np.array(remaining, float)
    count = len(values)
    inside = float(np.abs(values - np.median(values)).mean())
    others = np.array([np.median(np.delete(values, n)) for n in range(count)])
    outside = float(np.abs(values - others).mean())
    apart = float(np.abs(values[:, None] - values).sum() / (count * (count - 1)))
    return {
        "mae_in_sample": inside,
        "mae_leave_one_out": outside,
        "mae": (inside + outside) / 2,
        "crps": apart / 2,
    }


def errors(quantiles: Array, prefixes: Sequence[Prefix]) -> dict[str, Array]:
    """Return [prefixes] of `mae` and `crps`: a model's mean error over each prefix's continuations."""
    parts: dict[str, list[float]] = {"mae": [], "crps": []}
    for row, prefix in zip(quantiles, prefixes, strict=True):
        remaining = np.array(prefix.remaining, float)
        bounded = metrics.bounded(np.tile(row, (len(remaining), 1)), np.full(len(remaining), float(prefix.room)))
        parts["mae"].append(float(metrics.absolute_error(bounded, remaining).mean()))
        parts["crps"].append(float(2 * metrics.pinball(bounded, remaining).mean()))
    return {name: np.array(values) for name, values in parts.items()}


def summary(prefixes: Sequence[Prefix], prompts: NDArray[np.int64]) -> dict[str, Any]:
    """Return the floor over prefixes with its interval; `prompts` numbers each prefix's prompt."""
    bootstrap = metrics.Bootstrap(prompts)
    rows = [of_prefix(p.remaining) for p in prefixes]
    result: dict[str, Any] = {
        "prefixes": len(prefixes),
        "continuations": min(len(p.remaining) for p in prefixes),
    }
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        result[name] = round(float(values.mean()), 4)
        result[f"{name}_interval"] = bootstrap.interval(values)
    return result


def reducible(
    own: Mapping[str, Array], baseline: Mapping[str, Array], prefixes: Sequence[Prefix], prompts: NDArray[np.int64]
) -> dict[str, Any]:
    """Return what share of a baseline's reducible error a model removes: (baseline - own) / (baseline - floor)."""
    bootstrap = metrics.Bootstrap(prompts)
    rows = [of_prefix(p.remaining) for p in prefixes]
    result: dict[str, Any] = {}
    for name in ("mae", "crps"):
        least = np.array([row[name] for row in rows])
        gained, possible = baseline[name] - own[name], baseline[name] - least
        result[name] = round(float(gained.sum() / possible.sum()), 4) if possible.sum() > 0 else None
        result[f"{name}_interval"] = bootstrap.interval(gained, possible)
    return result
