"""Settings of admission: how full an instance may become, and the share of the request that has waited longest.

A request is admitted where a high quantile of memory, itself included, stays below the instance's capacity less a
headroom for as long as it is likely to run (loop.py).
"""

from dataclasses import dataclass

import numpy as np

MOST_CACHED_WEIGHT = 16.0


@dataclass(frozen=True, slots=True)
class AdmissionSettings:
    """How much an instance admits, and the share of the oldest waiting request.

    Attributes
    ----------
    deviations
        Standard deviations above the expectation that must still fit.
    headroom
        Share of an instance's KV that admission leaves free.
    tpot_margin
        Where TPOT has an objective, an instance is also full when a step takes the objective less this share.
    age_share
        Share of the admitted memory-time that goes to the request that has waited longest: the bound on starvation.
    cached_weight
        How many tokens a fuller instance may be ahead of an emptier one, for each token of the request that it has
        cached: these need not be pulled. 0: what is cached does not count. Whether a request fits never depends on it.
    """

    deviations: float = 1.0
    headroom: float = 0.01
    tpot_margin: float = 0.1
    age_share: float = 0.05
    cached_weight: float = 0.0


def tokens_within(step_s: float, base_s: float, per_request_s: float, per_token_s: float, batch: int) -> float:
    """Return the resident tokens with which a step of a batch takes `step_s`; infinite where no token costs time."""
    left_s = step_s - base_s - per_request_s * batch
    return left_s / per_token_s if per_token_s > 0.0 else np.inf
