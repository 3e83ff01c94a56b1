"""`ares`: rebalancing on the forecast.

The load of an instance k steps ahead is the time of its decode step then: base + request x running + token x resident
(resident tokens where the step time is unknown). The objective is the sum over instances and horizon of beta_k load^2,
which for equal instances is their variance, plus a penalty on memory: the square of what a high quantile of resident
tokens exceeds the capacity by. Moving request r from s to d, with own load a_s(k) and a_d(k), changes the first term by

    sum_k beta_k (-2 load_s a_s + a_s^2 + 2 load_d a_d + a_d^2),

linear in the loads. The inner loops are in pairs.py.

Only pairs that can matter are scored: those of the few worst sources above (1 + theta) times the mean and the few best
targets, first on 8 points of the horizon; the best are then looked at on all points, memory included. The forecast
itself is one pass over all rows.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ares.policy.cluster import Cluster
from ares.policy.forecast import FloatArray, forecast, geometric_grid, prepare_forecast, quantile_weights
from ares.policy.rebalance.base import MigrationDecision, Rebalance, register
from ares.policy.settings import in_range

IntArray = NDArray[np.int64]

_COARSE = 8  # points of the horizon on which all pairs are scored; the best ones are scored again on every point
_STEP_S = 0.02  # of a step, where no step-time model is known


@dataclass(frozen=True, slots=True)
class AresSettings:
    """Settings of `ares`.

    Attributes
    ----------
    theta
        An instance is overloaded above (1 + theta) times the mean load.
    minimum_gain
        Smallest reduction of the spread that is worth a move, as a share of the squared mean load.
    reserve
        Share of a target's KV that a move never fills, left for the growth of what runs there.
    moves_per_round
        Most moves of one decision; one for every 32 instances where that is more. An instance is the source or the
        target of at most one move in a round.
    cooldown_s
        Seconds during which a request that was moved is not moved again.
    horizon, points
        Steps ahead that the forecast covers, and the points of its geometric grid; horizon 0 is the current load alone.
    decay
        Steps ahead at which the forecast counts a quarter of the present.
    amortise
        A request moves only if its predicted remaining time exceeds `amortise` times its transfer and stall.
    deviations
        Standard deviations above the expectation that count as safe for memory.
    memory_weight
        Weight of forecast memory beyond the limit, against the spread of step time.
    sources, targets
        How many of the most and of the least loaded instances one decision considers.
    """

    theta: float = 0.1
    minimum_gain: float = 0.01
    reserve: float = 0.1
    moves_per_round: int = 2
    cooldown_s: float = 10.0
    horizon: int = 4000
    points: int = 64
    decay: float = 1000.0
    amortise: float = 4.0
    deviations: float = 1.3
    memory_weight: float = 4.0
    sources: int = 4
    targets: int = 8

    def __post_init__(self) -> None:
        check(self)


def check(settings: Any) -> None:
    """Raise ValueError where settings of a forecast are out of range."""
    in_range(settings, reserve=1.0, points=10_000)
    if settings.points < 1 or settings.decay <= 0:
        raise ValueError("settings points and decay must be greater than 0")


@lru_cache(maxsize=8)
def horizon_weights(horizon: int, points: int, decay: float) -> FloatArray:
    """Weights of the grid points, shape (K,): the steps each stands for, discounted by (1 + k / decay)^-2, sum 1."""
    grid = geometric_grid(horizon, points)
    width = np.diff(np.append(grid, 2 * grid[-1] - grid[-2] if len(grid) > 1 else 1)).astype(np.float64)
    beta: FloatArray = width / (1.0 + grid / decay) ** 2
    beta /= beta.sum()
    return beta


@lru_cache(maxsize=8)
def coarse_grid(horizon: int, points: int, decay: float) -> tuple[IntArray, FloatArray]:
    """Grid points that stand for equal parts of the weight, and the weight of each part."""
    beta = horizon_weights(horizon, points, decay)
    part = np.minimum(((np.cumsum(beta) - beta / 2.0) * _COARSE).astype(np.int64), _COARSE - 1)
    chosen = np.unique(part, return_index=True)[1]
    ends = np.append(chosen[1:], len(beta))
    middle = (chosen + ends - 1) // 2
    return middle, np.add.reduceat(beta, chosen)


def decide(cluster: Cluster, settings: AresSettings) -> list[MigrationDecision]:
    """Decide the moves of one period; see the module's docstring for the rule."""
    if len(cluster.location) == 0 or int(cluster.open.sum()) < 2:
        return []
    from ares.policy.rebalance.pairs import choose_moves  # imports numba: only where it is needed

    shape = (settings.horizon, settings.points, settings.decay)
    ahead = forecast(cluster, geometric_grid(settings.horizon, settings.points))
    remaining, levels = cluster.remaining_or_infinite()
    base, request, token, known = _cost_model(cluster)
    budget = max(settings.moves_per_round, len(cluster.instances) // 32)
    pairs, numbers = np.empty((budget, 3), np.int64), np.empty((budget, 8))
    count = choose_moves(
        (
            np.ascontiguousarray(cluster.location, np.int64),
            np.ascontiguousarray(cluster.resident_tokens, np.int64),
            np.ascontiguousarray(cluster.movable, np.bool_),
            np.ascontiguousarray(remaining, np.float64),
        ),
        (
            np.ascontiguousarray(cluster.open, np.bool_),
            cluster.capacity_tokens.astype(np.float64) * (1.0 - settings.reserve),
            base,
            request,
            token,
        ),
        (ahead.expected, ahead.allocated, ahead.variance, ahead.count),
        (ahead.grid.astype(np.float64), horizon_weights(*shape), *coarse_grid(*shape), quantile_weights(levels)),
        (
            settings.theta,
            settings.minimum_gain,
            settings.deviations,
            settings.memory_weight,
            settings.sources,
            settings.targets,
            cluster.block_tokens,
            0.0 if known else _STEP_S,
            settings.amortise * cluster.stall_s,
            settings.amortise * (cluster.token_bytes / cluster.transfer_bytes_s),
        ),
        pairs,
        numbers,
    )
    limit = cluster.capacity_tokens * (1.0 - settings.reserve)
    return [
        _move(pair, found, float(limit[pair[2]]), known)
        for pair, found in zip(pairs[:count].tolist(), numbers[:count].tolist(), strict=True)
    ]


def _cost_model(cluster: Cluster) -> tuple[FloatArray, FloatArray, FloatArray, bool]:
    """Return the step-time model, shape (I,) each, and whether it is known; if not, it counts resident tokens."""
    if cluster.step_base_s is None or cluster.step_request_s is None or cluster.step_token_s is None:
        count = len(cluster.instances)
        return np.zeros(count), np.zeros(count), np.ones(count), False
    return (
        np.ascontiguousarray(cluster.step_base_s, np.float64),
        np.ascontiguousarray(cluster.step_request_s, np.float64),
        np.ascontiguousarray(cluster.step_token_s, np.float64),
        True,
    )


def _move(pair: list[int], found: list[float], limit: float, known: bool) -> MigrationDecision:
    """Make the move that `choose_moves` has found, with its cause and the loads before and after."""
    row, source, target = pair
    gain, peak, source_less, target_more, source_load, target_load, mean, excess = found
    unit, factor = ("ms", 1e3) if known else ("tokens", 1.0)
    cause = "memory" if excess > 0.0 else "load"
    reason = (
        f"{cause}: source {source_load * factor:.4g} to {(source_load - source_less) * factor:.4g} {unit}, "
        f"target {target_load * factor:.4g} to {(target_load + target_more) * factor:.4g}, "
        f"mean {mean * factor:.4g}; target peak {peak:.0f} of {limit:.0f} tokens"
    )
    return MigrationDecision(request=row, source=source, target=target, gain=gain, reason=reason)


def prepare() -> None:
    """Compile the inner loops, which takes seconds, or load them from the cache."""
    from ares.policy.rebalance import pairs

    prepare_forecast()
    pairs.prepare()


@register("ares")
class Ares(Rebalance):
    """Evens out the predicted step time, and keeps predicted memory within its limit."""

    Settings = AresSettings
    predicts = True
    settings: AresSettings

    @classmethod
    def prepare(cls) -> None:
        """Compile the inner loops."""
        prepare()

    def decide(self, cluster: Cluster) -> list[MigrationDecision]:
        """Return the moves of one period."""
        return decide(cluster, self.settings)
