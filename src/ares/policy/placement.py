"""Dispatch by forecast, as a gateway calls it: one request at a time, no queue of its own."""

import numpy as np

from ares.policy.admission.forecast import GRID
from ares.policy.cluster import Cluster
from ares.policy.dispatch import DISPATCHERS
from ares.policy.forecast import FloatArray, forecast, quantile_weights


class Forecast:
    """The open instance whose predicted peak of memory, the request included, leaves the largest share free."""

    def __call__(self, cluster: Cluster, prompt_tokens: int, remaining: FloatArray | None = None) -> int | None:
        """Return the chosen instance, or None where none is open.

        Parameters
        ----------
        cluster
            The decode pool.
        prompt_tokens
            Tokens whose KV the request brings.
        remaining
            Quantiles of its output at the cluster's levels, shape (Q,); None: it outlasts the horizon.
        """
        if not cluster.open.any():
            return None
        from ares.policy.admission.loop import best_peak, own_curve  # imports numba, where it is installed

        weights = quantile_weights(cluster.levels)
        left = np.full(len(weights), np.inf) if remaining is None else remaining
        mean, variance = np.zeros(len(GRID)), np.zeros(len(GRID))
        own_curve(float(prompt_tokens), left, weights, GRID.astype(np.float64), cluster.block_tokens, mean, variance)
        expected = forecast(cluster, GRID).held
        if cluster.waiting_tokens is not None:
            expected = expected + cluster.waiting_tokens[:, None]
        closed = (~cluster.open).astype(np.int64)
        return int(best_peak(expected, cluster.capacity_tokens.astype(np.int64), closed, mean))


DISPATCHERS["forecast"] = Forecast  # registered here: this module builds on the baselines' one

__all__ = ["DISPATCHERS", "Forecast"]
