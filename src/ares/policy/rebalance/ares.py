"""`ares`: rebalancing on the forecast.

The load of an instance k steps ahead is the time of its decode step then: base + request x running + token x resident
(plain resident tokens where no law is known). The objective is the sum over instances and horizon of beta_k load^2,
which for equal instances is their variance, plus a penalty on memory: the square of what a high quantile of resident
tokens exceeds the capacity by. Moving request r from s to d, with own load a_s(k) and a_d(k), changes the first term by

    sum_k beta_k (-2 load_s a_s + a_s^2 + 2 load_d a_d + a_d^2),

linear in the loads, so one matrix product scores every (request, target) pair of a source.

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
from ares.policy.forecast import FloatArray, Forecast, forecast, geometric_grid, quantile_weights
from ares.policy.kernels import compiled, loads, prepare, row_curves, take_pairs
from ares.policy.rebalance.base import Move, Rebalance, register
from ares.policy.settings import in_range

IntArray = NDArray[np.int64]

_COARSE = 8  # points of the horizon on which all pairs are scored; the best ones are scored again on every point
_TRIES = 32  # pairs looked at closely in one decision, beside those that become moves


@dataclass(frozen=True, slots=True)
class AresSettings:
    """Settings of `ares`.

    Attributes
    ----------
    theta
        An instance is overloaded above (1 + theta) times the mean load.
    minimum_gain
        Smallest worthwhile cut of the spread, as a share of the squared mean load: stops moves that only jitter.
    reserve
        Share of a target's KV that a move never fills, left for the growth of what runs there.
    moves_per_round
        Most moves one decision may order; one for every 32 instances where that is more. No instance gives twice,
        takes twice, or does both in a round.
    cooldown_s
        Seconds during which a request that was moved is not moved again.
    horizon, points
        Steps ahead that the forecast covers, and the points of its geometric grid; horizon 0 is today's load alone.
    decay
        Steps ahead at which the forecast counts a quarter of the present.
    amortise
        A request moves only if its predicted remaining time exceeds `amortise` times its transfer and stall.
    deviations
        Standard deviations above the expectation that count as safe for memory.
    memory_weight
        Weight of forecast memory beyond the limit, against the spread of step time.
    sources, targets
        How many of the most and of the least loaded instances one decision looks at.
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
def _coarse(horizon: int, points: int, decay: float) -> tuple[IntArray, FloatArray]:
    """Grid points that stand for equal parts of the weight, and the weight of each part."""
    beta = horizon_weights(horizon, points, decay)
    part = np.minimum(((np.cumsum(beta) - beta / 2.0) * _COARSE).astype(np.int64), _COARSE - 1)
    chosen = np.unique(part, return_index=True)[1]
    ends = np.append(chosen[1:], len(beta))
    middle = (chosen + ends - 1) // 2
    return middle, np.add.reduceat(beta, chosen)


@dataclass(frozen=True, slots=True)
class _Law:
    """Step law of every instance, shape (I,); plain tokens where none is known."""

    base: FloatArray
    request: FloatArray
    token: FloatArray
    known: bool

    @classmethod
    def of(cls, cluster: Cluster) -> "_Law":
        if cluster.step_base_s is None or cluster.step_request_s is None or cluster.step_token_s is None:
            count = len(cluster.instances)
            return cls(np.zeros(count), np.zeros(count), np.ones(count), known=False)
        return cls(cluster.step_base_s, cluster.step_request_s, cluster.step_token_s, known=True)


def _atoms(cluster: Cluster) -> tuple[FloatArray, FloatArray]:
    """Return the atoms of what is left of each row, shape (R, Q), and their weights, shape (Q,)."""
    if cluster.remaining_tokens is None:
        return np.full((len(cluster.location), 1), np.inf), quantile_weights((0.5,))
    return np.ascontiguousarray(cluster.remaining_tokens), quantile_weights(cluster.levels)


def _curves(cluster: Cluster, rows: IntArray, steps: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Probability to run and expected tokens of some rows, shape (C, K) each."""
    alive = np.zeros((len(rows), len(steps)))
    remaining, weights = _atoms(cluster)
    kernel = compiled(row_curves)
    if kernel is not None:
        tokens = np.empty_like(alive)
        kernel(rows, cluster.resident_tokens, remaining, weights, steps, alive, tokens)
        return alive, tokens
    for atom, weight in enumerate(weights):
        alive += weight * ~(remaining[rows, atom, None] <= steps)  # NaN outlasts every step
    return alive, alive * (cluster.resident_tokens[rows].astype(np.float64)[:, None] + steps)


def _worth_the_transfer(
    cluster: Cluster, rows: IntArray, step_s: FloatArray, settings: AresSettings
) -> NDArray[np.bool_]:
    """Tell which rows are likely to run long after their transfer (phase 2 of the paper)."""
    if cluster.remaining_tokens is None:
        return np.ones(len(rows), np.bool_)
    left = cluster.remaining_tokens[rows, len(cluster.levels) // 2]
    transfer_s = cluster.resident_tokens[rows] * (cluster.token_bytes / cluster.transfer_bytes_s)
    short: NDArray[np.bool_] = left * step_s <= settings.amortise * (transfer_s + cluster.stall_s)
    return ~short


def decide(cluster: Cluster, settings: AresSettings) -> list[Move]:
    """Decide the moves of one period; see the module's docstring for the rule."""
    if len(cluster.location) == 0 or int(cluster.open.sum()) < 2:
        return []
    grid = geometric_grid(settings.horizon, settings.points)
    beta = horizon_weights(settings.horizon, settings.points, settings.decay)
    law = _Law.of(cluster)
    ahead = forecast(cluster, grid)
    limit = cluster.capacity_tokens.astype(np.float64) * (1.0 - settings.reserve)
    time, excess = _loads(ahead, law, limit, settings.deviations)
    return _Round(cluster, settings, law, ahead, limit, time, excess, beta).decide()


def _loads(ahead: Forecast, law: _Law, limit: FloatArray, deviations: float) -> tuple[FloatArray, FloatArray]:
    """Step time ahead, and memory's high quantile beyond the limit, shape (I, K) each."""
    kernel = compiled(loads)
    if kernel is not None:
        time, excess = np.empty_like(ahead.expected), np.empty_like(ahead.expected)
        laws = (law.base, law.request, law.token)
        kernel(ahead.expected, ahead.held, ahead.variance, ahead.count, laws, limit, deviations, time, excess)
        return time, excess
    time = law.request[:, None] * ahead.count + law.base[:, None] + law.token[:, None] * ahead.expected
    return time, np.maximum(ahead.high(deviations) - limit[:, None], 0.0)


class _Round:
    """One decision: classify, score coarsely, take the best moves that hold when looked at closely."""

    def __init__(
        self,
        cluster: Cluster,
        settings: AresSettings,
        law: _Law,
        ahead: Forecast,
        limit: FloatArray,
        time: FloatArray,
        excess: FloatArray,
        beta: FloatArray,
    ) -> None:
        self.cluster, self.settings, self.law, self.ahead, self.beta = cluster, settings, law, ahead, beta
        self.limit, self.time, self.excess = limit, time, excess
        self.steps = ahead.grid.astype(np.float64)
        self.load = time @ beta
        self.mean = float(self.load[cluster.open].mean())

    def decide(self) -> list[Move]:
        """Return the moves, best first."""
        settings, cluster = self.settings, self.cluster
        pressure = (self.excess @ self.beta) / np.maximum(self.limit, 1.0)
        over = cluster.open & ((self.load > (1.0 + settings.theta) * self.mean) | (pressure > 0.0))
        sources = np.flatnonzero(over)
        targets = np.flatnonzero(cluster.open & (self.load < self.mean))
        if not len(sources) or not len(targets):
            return []
        budget = max(settings.moves_per_round, len(cluster.instances) // 32)
        worst = self.load[sources] / self.mean + settings.memory_weight * pressure[sources]
        sources = sources[np.argsort(-worst, kind="stable")][: max(settings.sources, budget)]
        targets = targets[np.argsort(self.load[targets], kind="stable")][: max(settings.targets, budget)]
        rows, which = self._rows(sources)
        if not len(rows):
            return []
        gain = self._coarse_gain(rows, sources[which], targets)
        if (sources[:, None] == targets).any():
            gain[sources[which][:, None] == targets] = -np.inf
        return self._take(rows, which, sources, targets, gain, budget)

    def _rows(self, sources: IntArray) -> tuple[IntArray, IntArray]:
        """Movable rows of the sources that are worth a transfer, and which source each is on."""
        position = np.full(len(self.cluster.instances), -1, np.int64)
        position[sources] = np.arange(len(sources))
        which = position[self.cluster.location]
        rows = np.flatnonzero((which >= 0) & self.cluster.movable)
        step_s = self.load[self.cluster.location[rows]] if self.law.known else np.full(len(rows), 0.02)
        rows = rows[_worth_the_transfer(self.cluster, rows, step_s, self.settings)]
        group = which[rows]
        order = np.argsort(group, kind="stable")
        return rows[order], group[order]

    def _coarse_gain(self, rows: IntArray, source: IntArray, targets: IntArray) -> FloatArray:
        """Score every pair on a few points of the horizon, shape (C, T)."""
        settings, law = self.settings, self.law
        points, beta = _coarse(settings.horizon, settings.points, settings.decay)
        alive, tokens = _curves(self.cluster, rows, self.steps[points])
        request, token = law.request[source][:, None], law.token[source][:, None]
        own = request * alive + token * tokens
        time = self.time[:, points]
        relief = ((2.0 * time.take(source, axis=0) - own) * own) @ beta
        weighted = beta[:, None] * time[targets].T
        first = (law.request[targets], law.token[targets])
        if np.ptp(law.request) == 0.0 and np.ptp(law.token) == 0.0:
            burden = 2.0 * (own @ weighted) + ((own * own) @ beta)[:, None]
        else:
            burden = 2.0 * ((alive @ weighted) * first[0] + (tokens @ weighted) * first[1])
            burden += ((alive * alive) @ beta)[:, None] * first[0] ** 2
            burden += ((tokens * tokens) @ beta)[:, None] * first[1] ** 2
            burden += 2.0 * ((alive * tokens) @ beta)[:, None] * (first[0] * first[1])
        excess = self.excess[:, points].take(source, axis=0)
        left = np.maximum(excess - tokens, 0.0)
        memory = ((excess * excess - left * left) @ beta) / np.maximum(self.limit[source], 1.0) ** 2
        gain: FloatArray = (relief[:, None] - burden) / (self.mean * self.mean)
        gain += settings.memory_weight * memory[:, None]
        return gain

    def _take(
        self,
        rows: IntArray,
        which: IntArray,
        sources: IntArray,
        targets: IntArray,
        gain: FloatArray,
        budget: int,
    ) -> list[Move]:
        """Take the best pairs that hold on every point of the horizon (kernels.py), and say why."""
        first = np.ones(len(which), np.bool_)
        np.not_equal(which[1:], which[:-1], out=first[1:])
        starts = np.flatnonzero(first)
        best = np.maximum.reduceat(gain, starts, axis=0)
        cluster, settings, law, ahead = self.cluster, self.settings, self.law, self.ahead
        pairs, numbers = np.empty((budget, 3), np.int64), np.empty((budget, 4))
        count = (compiled(take_pairs) or take_pairs)(
            gain,
            best,
            np.append(starts, len(rows)),
            rows,
            sources[which[starts]],
            targets,
            cluster.resident_tokens,
            *_atoms(cluster),
            self.steps,
            self.beta,
            np.column_stack((law.request, law.token)),
            self.time,
            self.excess,
            ahead.held,
            ahead.variance,
            self.limit,
            (self.mean, settings.deviations, settings.memory_weight, settings.minimum_gain),
            cluster.block_tokens,
            _TRIES,
            pairs,
            numbers,
        )
        return [
            self._move(*pair, *found) for pair, found in zip(pairs.tolist(), numbers[:count].tolist(), strict=False)
        ]

    def _move(self, row: int, source: int, target: int, gain: float, peak: float, leaves: float, enters: float) -> Move:
        """Make the move with its cause and the loads before and after."""
        unit, factor = ("ms", 1e3) if self.law.known else ("tokens", 1.0)
        before = (self.load[source] * factor, self.load[target] * factor)
        after = (before[0] - leaves * factor, before[1] + enters * factor)
        cause = "memory" if self.excess[source].any() else "load"
        reason = (
            f"{cause}: source {before[0]:.4g} to {after[0]:.4g} {unit}, target {before[1]:.4g} to {after[1]:.4g}, "
            f"mean {self.mean * factor:.4g}; target peak {peak:.0f} of {self.limit[target]:.0f} tokens"
        )
        return Move(request=row, source=source, target=target, gain=gain, reason=reason)


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

    def decide(self, cluster: Cluster) -> list[Move]:
        """Return the moves of one period."""
        return decide(cluster, self.settings)
