"""`forecast`: the open instance whose predicted peak of memory, the request included, leaves the largest share free.

What an instance has cached of the request counts as in admission.
"""

from dataclasses import dataclass

import numpy as np

from ares.policy.admission.forecast import GRID
from ares.policy.admission.settings import MOST_CACHED_WEIGHT
from ares.policy.cluster import Cluster, FloatArray
from ares.policy.dispatch.base import SMALLEST_PEAK, Dispatch, register
from ares.policy.forecast import forecast, quantile_weights
from ares.policy.settings import in_range


@dataclass(frozen=True, slots=True)
class ForecastDispatchSettings:
    """Settings.

    Attributes
    ----------
    cached_weight
        As in admission (policy/admission/settings.py).
    """

    cached_weight: float = 0.0

    def __post_init__(self) -> None:
        in_range(self, cached_weight=MOST_CACHED_WEIGHT)


@register("forecast")
class Forecast(Dispatch):
    """The smallest predicted peak, as a share of memory."""

    Settings = ForecastDispatchSettings
    settings: ForecastDispatchSettings
    rule = SMALLEST_PEAK
    quick = True
    sees_requests = True
    predicts = True
    needs_predictions = True

    @classmethod
    def sees_prefixes(cls, settings: ForecastDispatchSettings) -> bool:
        """Return whether cached tokens count."""
        return bool(settings.cached_weight)

    @classmethod
    def prepare(cls) -> None:
        """Compile the inner loop."""
        from ares.policy.admission import loop  # imports numba, where it is installed

        loop.prepare()

    def choose(self, cluster: Cluster, tokens: int, remaining: FloatArray | None) -> int | None:
        """Return the chosen instance; a request without a prediction outlasts the horizon."""
        if not cluster.open.any():
            return None
        from ares.policy.admission.loop import best_peak, own_curve  # imports numba, where it is installed

        weights = quantile_weights(cluster.levels)
        left = np.full(len(weights), np.inf) if remaining is None else remaining
        mean, variance = np.zeros(len(GRID)), np.zeros(len(GRID))
        own_curve(float(tokens), left, weights, GRID.astype(np.float64), cluster.block_tokens, mean, variance)
        expected = forecast(cluster, GRID).allocated
        closed = (~cluster.open).astype(np.int64)
        lead: FloatArray = np.zeros(len(closed))
        if cluster.cached_tokens is not None:
            lead += self.settings.cached_weight * cluster.cached_tokens
        return int(best_peak(expected, cluster.capacity_tokens.astype(np.int64), closed, lead, mean))
