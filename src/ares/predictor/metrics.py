"""Metrics of predictions: quantiles at `hazard.LEVELS`, whose median is the point estimate."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ares.predictor.hazard import LEVELS

Array = NDArray[np.float64]
_LEVELS = np.array(LEVELS)
FRACTIONS = (0.0, 0.25, 0.5, 0.75)
_RESAMPLES = 1000


def at_level(quantiles: Array, level: float) -> Array:
    """Return [pairs]: the quantile at one level, between the two that frame it."""
    right = int(np.clip(np.searchsorted(_LEVELS, level), 1, len(_LEVELS) - 1))
    share = (level - _LEVELS[right - 1]) / (_LEVELS[right] - _LEVELS[right - 1])
    result: Array = quantiles[:, right - 1] * (1 - share) + quantiles[:, right] * share
    return result


def bounded(quantiles: Array, room: Array) -> Array:
    """Return quantiles bounded by the tokens that the limit still allows."""
    return np.minimum(quantiles, room[:, None])


def absolute_error(quantiles: Array, remaining: Array) -> Array:
    """Return [pairs]: |median - truth|."""
    return np.abs(at_level(quantiles, 0.5) - remaining)


def pinball(quantiles: Array, remaining: Array) -> Array:
    """Return [pairs]: mean pinball loss over the levels; twice of it is the CRPS over them."""
    error = remaining[:, None] - quantiles
    result: Array = np.maximum(_LEVELS * error, (_LEVELS - 1) * error).mean(1)
    return result


def covered(quantiles: Array, remaining: Array, level: float) -> Array:
    """Return [pairs]: 1 where the truth is at or below the quantile of that level, else 0."""
    return (remaining <= at_level(quantiles, level)).astype(float)


def covered_fairly(quantiles: Array, remaining: Array, room: Array, level: float) -> Array:
    """Return `covered` where a part of the distribution may be on one number, the limit.

    A request that reaches its limit with a probability of 30 % has its 90th percentile there, and "at or below" is then
    true in 100 % of the cases, not 90, even if the forecast is calibrated. So an output that is cut counts as
    covered by the part of the limit's probability that lies below the level (a randomised probability transform, with
    its expectation in place of the draw); calibrated forecasts then cover exactly `level`.
    """
    quantile = at_level(quantiles, level)
    atom = (quantile >= room - 0.5) & (remaining >= room)
    below = (quantiles < room[:, None] - 0.5).mean(1)  # the probability below the limit
    inside = np.clip((level - below) / np.maximum(1 - below, 1e-9), 0, 1)
    result: Array = np.where(atom, inside, covered(quantiles, remaining, level))
    return result


def tau(quantiles: Array, remaining: Array) -> float:
    """Return Kendall's tau-b between median and truth."""
    from scipy.stats import kendalltau

    if len(remaining) < 2:
        return 0.0
    value = float(kendalltau(at_level(quantiles, 0.5), remaining).statistic)
    return value if np.isfinite(value) else 0.0


class Bootstrap:
    """Resamples of prompts, the same for every model, so that differences are paired.

    Parameters
    ----------
    groups
        [pairs] number of each pair's prompt.
    """

    def __init__(self, groups: NDArray[np.int64], seed: int = 0) -> None:
        _, self._group = np.unique(groups, return_inverse=True)
        count = int(self._group.max()) + 1
        self._weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), _RESAMPLES)

    def means(self, values: Array, over: Array | None = None) -> Array:
        """Return the resamples' ratios sum(values) / sum(over), by default means."""
        over = np.ones(len(values)) if over is None else over
        above = np.bincount(self._group, values, self._weights.shape[1])
        below = np.bincount(self._group, over, self._weights.shape[1])
        result: Array = (self._weights @ above) / np.maximum(self._weights @ below, 1e-9)
        return result

    def interval(self, values: Array, over: Array | None = None) -> list[float]:
        """Return the 95 % interval of the mean."""
        return interval(self.means(values, over))


def interval(resampled: Array) -> list[float]:
    """Return the 95 % interval of resampled values."""
    return [round(float(v), 4) for v in np.quantile(resampled, [0.025, 0.975])]


def summary(quantiles: Array, remaining: Array, room: Array, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return every number of one model on one set of pairs; `quantiles` are bounded by `room` here."""
    quantiles = bounded(quantiles, room)
    error, loss = absolute_error(quantiles, remaining), pinball(quantiles, remaining)
    result: dict[str, Any] = {
        "mae": float(error.mean()),
        "mae_interval": bootstrap.interval(error),
        "relative_mae": float(error.sum() / remaining.sum()),
        "kendall_tau": tau(quantiles, remaining),
        "pinball": float(loss.mean()),
        "crps": float(2 * loss.mean()),
        "crps_interval": bootstrap.interval(2 * loss),
    }
    for level in (0.5, 0.9):
        name = f"p{round(100 * level)}_coverage"
        fair = covered_fairly(quantiles, remaining, room, level)
        result[name] = float(fair.mean())
        result[f"{name}_interval"] = bootstrap.interval(fair)
        result[f"{name}_at_or_below"] = float(covered(quantiles, remaining, level).mean())
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}


def rows_by_position(output: NDArray[np.int64], position: Array, remaining: Array) -> dict[float, NDArray[np.int64]]:
    """Return for each of FRACTIONS the pair of each output that is nearest to that part of its generation."""
    part = position / (position + remaining)
    rows = {}
    for fraction in FRACTIONS:
        order = np.lexsort((np.abs(part - fraction), output))
        rows[fraction] = order[np.flatnonzero(np.diff(output[order], prepend=-1))]
    return rows
