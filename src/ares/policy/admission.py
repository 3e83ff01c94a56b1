"""Admission: whether a waiting request may enter decode now, and where.

`open` sends a request to its instance at once and leaves the rest to vLLM. `forecast` lets it in where a high quantile
of memory over a short horizon, the request included, stays below the instance's capacity less a headroom; among the
instances that qualify it takes the one where the predicted peak leaves the largest share free.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ares.policy.forecast import FloatArray

ADMISSION_GRID = (0, 32, 125, 250, 500, 1000, 2000, 4000, 8000, 16000)
"""Steps ahead at which admission forecasts memory; a request is checked only while it is likely to run."""

ADMISSIONS = ("open", "forecast")


@dataclass(frozen=True, slots=True)
class AdmissionSettings:
    """The knobs of admission and of the order of the waiting.

    Strictness runs from 0, at an offered load of `lax_below`, to 1, at `strict_above`. A lax admission takes every
    request that fits for the next moments, and leaves what grows later to the rebalancer; a strict one takes only what
    fits for as long as it will run, and keeps room for short requests. Offered load, not the length of the queue,
    decides: a strict admission makes queues itself, and would never find back.

    Attributes
    ----------
    lax_below, strict_above
        Offered load, as a multiple of what the instances' memory can serve, at strictness 0 and 1.
    window
        Requests over which offered load is averaged.
    horizon_lax, horizon_strict
        Most steps ahead that are checked, at strictness 0 and 1; geometric between.
    deviations
        Standard deviations above the expectation that must still fit, times strictness.
    headroom, room_for_short, short
        Share of an instance's KV that admission leaves free: `headroom`, plus for a request with p steps to go
        strictness x room_for_short p / (p + short). Long requests would otherwise fill every gap.
    age_share
        Share of the admitted memory-time that goes to whoever has waited longest: the bound on starvation.
    """

    lax_below: float = 0.95
    strict_above: float = 1.0
    window: float = 500.0
    horizon_lax: float = 125.0
    horizon_strict: float = 32000.0
    deviations: float = 1.5
    headroom: float = 0.01
    room_for_short: float = 0.2
    short: float = 1000.0
    room_floor: float = 0.0
    age_share: float = 0.1


def offered_load(volume: float, bias: float, gap_s: float, tokens: float, step_s: float) -> float:
    """Return arriving memory-time over what can be served.

    Parameters
    ----------
    volume
        Mean predicted memory-time of the latest requests, token-steps.
    bias
        Predicted over true memory-time of the latest completed requests: memory-time is quadratic in length, so even
        an unbiased prediction of length overstates it.
    gap_s
        Mean time between them.
    tokens
        KV tokens of all open instances.
    step_s
        Step time of a full instance.
    """
    return volume * step_s / max(bias * gap_s * tokens, 1e-9)


def strictness(offered: float, lax_below: float, strict_above: float) -> float:
    """Return how strict admission is, 0 to 1."""
    return min(1.0, max(0.0, (offered - lax_below) / max(strict_above - lax_below, 1e-9)))


def checked_horizon(strict: float, lax_steps: float, strict_steps: float) -> float:
    """Return how many steps ahead admission looks: geometric between the two."""
    return float(lax_steps * (strict_steps / lax_steps) ** strict)


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
