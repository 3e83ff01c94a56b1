"""Admission: whether a waiting request may enter decode now, and where.

`open` sends a request to its instance at once and leaves the rest to vLLM. `forecast` lets it in where a high quantile
of memory, the request included, stays below the instance's capacity less a headroom for as long as it is likely to
run; among the instances that qualify it takes the one where the predicted peak leaves the largest share free.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ares.policy.forecast import FloatArray

ADMISSION_GRID = (0, 32, 125, 250, 500, 1000, 2000, 4000, 8000, 16000)
"""Steps ahead at which dispatch and rescue forecast memory."""

ADMISSIONS = ("open", "forecast")


@dataclass(frozen=True, slots=True)
class AdmissionSettings:
    """The knobs of admission and of the order of the waiting.

    Attributes
    ----------
    deviations
        Standard deviations above the expectation that must still fit.
    headroom
        Share of an instance's KV that admission leaves free.
    tpot_margin
        Where TPOT has an objective, an instance is also full when a step takes the objective less this share.
    age_share
        Share of the admitted memory-time that goes to whoever has waited longest: the bound on starvation.
    """

    deviations: float = 1.0
    headroom: float = 0.01
    tpot_margin: float = 0.1
    age_share: float = 0.05


def tokens_within(step_s: float, base_s: float, per_request_s: float, per_token_s: float, batch: int) -> float:
    """Return the resident tokens with which a step of a batch takes `step_s`; infinite where no token costs time."""
    spare = step_s - base_s - per_request_s * batch
    return spare / per_token_s if per_token_s > 0.0 else np.inf


def admission_among(
    expected: FloatArray,
    variance: FloatArray,
    capacity: NDArray[np.int64],
    open_: NDArray[np.bool_],
    own_mean: FloatArray,
    own_variance: FloatArray,
    deviations: float,
    headroom: float,
) -> int:
    """Choose as `admission_choice` does, all instances at once in numpy; `open_` has shape (I,), all points count."""
    empty = open_ & (expected[:, 0] <= 0.0)
    if empty.any():
        return int(np.argmax(empty))
    peak = (expected + own_mean + deviations * np.sqrt(np.maximum(variance + own_variance, 0.0))).max(axis=1)
    share = np.where(open_, peak / np.maximum(capacity, 1), np.inf)
    best = int(np.argmin(share))
    return best if share[best] <= 1.0 - headroom else -1


def admission_choice(
    expected: FloatArray,
    variance: FloatArray,
    capacity: NDArray[np.int64],
    closed: NDArray[np.int64],
    own_mean: FloatArray,
    own_variance: FloatArray,
    points: int,
    deviations: float,
    headroom: float,
) -> int:
    """Choose the instance that a request may enter, or -1 where its predicted peak fits nowhere.

    Parameters
    ----------
    expected, variance
        Forecast of every instance over the grid, shape (I, K), tokens and tokens squared.
    capacity, closed
        KV tokens, and 1 for instances that take nobody, shape (I,).
    own_mean, own_variance
        The request's own curve, shape (K,).
    points
        How many points of the grid to check.
    deviations
        How many standard deviations above the expectation count as safe.
    headroom
        Share of the capacity that admission leaves free.
    """
    best = -1
    best_share = 1.0 - headroom
    for instance in range(expected.shape[0]):
        if closed[instance] != 0:
            continue
        if expected[instance, 0] <= 0.0:
            return instance  # an empty instance takes anyone: waiting could not make more room
        limit = best_share * capacity[instance]
        peak = 0.0
        for point in range(points):
            spread = np.sqrt(max(variance[instance, point] + own_variance[point], 0.0))
            peak = max(peak, expected[instance, point] + own_mean[point] + deviations * spread)
            if peak > limit:
                break
        if peak <= limit:
            best, best_share = instance, peak / capacity[instance]
    return best
