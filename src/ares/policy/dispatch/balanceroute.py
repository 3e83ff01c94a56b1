"""`balanceroute`: dispatch after BalanceRoute (Bu et al., arXiv 2605.06113), for comparison. Nothing is moved.

From the source (its abstract and public summaries; the text of the paper could not be read): an assignment is
permanent, and a step lasts as long as that of the most loaded worker, the envelope. A piecewise-linear score separates
the part of a request that fits the margin between a worker and the envelope from the part that exceeds and raises it.
BR-0 uses current loads; BR-H adds a short, constant lookahead, discounted over the horizon, with a classifier of the
requests that end within it.

Reconstructed here: the score is by how much an admission of s tokens reduces the idle work of one step, the sum over
all G workers of envelope - load. With the margin m of the chosen one that is F = min(s, m) - (G - 1) max(s - m, 0). Of
BR-H, F is summed over steps ahead with weights gamma^h, loads and envelope being those of our forecast, whose
quantiles stand for the classifier; `lookahead = 0` is BR-0. Equal scores are decided by the smallest current load. Left
out: the choice among all waiting requests (ARES dispatches each on arrival), and so the second of its two stages.
"""

from dataclasses import dataclass

import numpy as np

from ares.policy.cluster import Cluster, FloatArray
from ares.policy.dispatch.base import Dispatch, register
from ares.policy.forecast import forecast, geometric_grid, quantile_weights
from ares.policy.settings import in_range


@dataclass(frozen=True, slots=True)
class BalanceRouteSettings:
    """Settings of `balanceroute`.

    Attributes
    ----------
    lookahead
        Steps ahead that are looked at; 0: now only (BR-0).
    points
        Of these steps, how many at most.
    discount
        Weight of a step ahead over that of the one before it.
    """

    lookahead: int = 1000
    points: int = 16
    discount: float = 0.99

    def __post_init__(self) -> None:
        in_range(self, discount=1.0, points=1000.0)
        if self.points < 1:
            raise ValueError(f"setting points must be at least 1, not {self.points!r}")


def score(margin: FloatArray, tokens: FloatArray, workers: int) -> FloatArray:
    """Return F: what fills the margin, less what overflows it for each of the other workers.

    Parameters
    ----------
    margin
        Tokens between each worker's load and the envelope, shape (I, K).
    tokens
        What the request holds at each point of the horizon, shape (K,).
    workers
        How many workers wait for the slowest.
    """
    fits: FloatArray = np.minimum(tokens, margin)
    result: FloatArray = fits - (workers - 1) * np.maximum(tokens - margin, 0.0)
    return result


@register("balanceroute")
class BalanceRoute(Dispatch):
    """The instance whose load may grow most without becoming the largest, now and over the next steps."""

    Settings = BalanceRouteSettings
    settings: BalanceRouteSettings
    sees_requests = True
    predicts = True
    quick = True

    def choose(self, cluster: Cluster, tokens: int, remaining: FloatArray | None) -> int | None:
        """Return the open instance with the largest score."""
        if not cluster.open.any():
            return None
        grid = geometric_grid(self.settings.lookahead, self.settings.points)
        load = forecast(cluster, grid).expected
        left = np.full(len(cluster.levels), np.inf) if remaining is None else remaining
        runs = (~(left[:, None] <= grid)).T @ quantile_weights(cluster.levels)  # NaN outlasts every step
        own = (tokens + grid) * runs
        margin = load[cluster.open].max(axis=0) - load
        each = score(margin, own, int(np.count_nonzero(cluster.open)))
        total = each @ self.settings.discount ** grid.astype(np.float64)
        total[~cluster.open] = -np.inf
        best = np.flatnonzero(total >= total.max())
        return int(best[np.argmin(load[best, 0] / np.maximum(cluster.capacity_tokens[best], 1))])
