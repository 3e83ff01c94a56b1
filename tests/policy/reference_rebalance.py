"""The rule of `ares` written with whole arrays: what its compiled loops (pairs.py) must decide."""

from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ares.policy import Cluster, MigrationDecision
from ares.policy.forecast import FloatArray, Forecast, geometric_grid, plain_forecast, quantile_weights
from ares.policy.rebalance.ares import AresSettings, coarse_grid, horizon_weights
from ares.policy.rebalance.pairs import TRIES
from ares.policy.rebalance.paper import PaperSettings

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _StepModel:
    """Step-time model of every instance, shape (I,); resident tokens where it is unknown."""

    base: FloatArray
    request: FloatArray
    token: FloatArray
    known: bool

    @classmethod
    def of(cls, cluster: Cluster) -> "_StepModel":
        if cluster.step_base_s is None or cluster.step_request_s is None or cluster.step_token_s is None:
            count = len(cluster.instances)
            return cls(np.zeros(count), np.zeros(count), np.ones(count), known=False)
        return cls(cluster.step_base_s, cluster.step_request_s, cluster.step_token_s, known=True)


def _quantiles(cluster: Cluster) -> tuple[FloatArray, FloatArray]:
    """Return the quantiles of what is left of each row, shape (R, Q), and their weights, shape (Q,)."""
    if cluster.remaining_tokens is None:
        return np.full((len(cluster.location), 1), np.inf), quantile_weights((0.5,))
    return np.ascontiguousarray(cluster.remaining_tokens), quantile_weights(cluster.levels)


def _curves(cluster: Cluster, rows: IntArray, steps: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Probability to run and expected tokens of some rows, shape (C, K) each."""
    alive = np.zeros((len(rows), len(steps)))
    remaining, weights = _quantiles(cluster)
    for quantile, weight in enumerate(weights):
        alive += weight * ~(remaining[rows, quantile, None] <= steps)  # NaN outlasts every step
    return alive, alive * (cluster.resident_tokens[rows].astype(np.float64)[:, None] + steps)


def _worth_the_transfer(
    cluster: Cluster, rows: IntArray, step_s: FloatArray, settings: AresSettings
) -> NDArray[np.bool_]:
    """Tell which rows are likely to run long after their transfer (phase 2 of the paper)."""
    if cluster.remaining_tokens is None:
        return np.ones(len(rows), np.bool_)
    left = cluster.remaining_tokens[rows, len(cluster.levels) // 2]
    pause_s, token_s = settings.amortise * cluster.stall_s, cluster.token_bytes / cluster.transfer_bytes_s
    least_s = pause_s + settings.amortise * token_s * cluster.resident_tokens[rows]
    short: NDArray[np.bool_] = left * step_s <= least_s
    return ~short


def decide(cluster: Cluster, settings: AresSettings) -> list[MigrationDecision]:
    """Decide the moves of one period."""
    if len(cluster.location) == 0 or int(cluster.open.sum()) < 2:
        return []
    grid = geometric_grid(settings.horizon, settings.points)
    beta = horizon_weights(settings.horizon, settings.points, settings.decay)
    step_model = _StepModel.of(cluster)
    ahead = plain_forecast(cluster, grid)
    limit = cluster.capacity_tokens.astype(np.float64) * (1.0 - settings.reserve)
    time, excess = _loads(ahead, step_model, limit, settings.deviations)
    return _Round(cluster, settings, step_model, ahead, limit, time, excess, beta).decide()


def _loads(
    ahead: Forecast, step_model: _StepModel, limit: FloatArray, deviations: float
) -> tuple[FloatArray, FloatArray]:
    """Step time ahead, and memory's high quantile beyond the limit, shape (I, K) each."""
    time = (
        step_model.request[:, None] * ahead.count
        + step_model.base[:, None]
        + step_model.token[:, None] * ahead.expected
    )
    return time, np.maximum(ahead.high(deviations) - limit[:, None], 0.0)


def _dot(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the weighted sums over the last axis, taken in order; a matrix product takes them as the machine likes."""
    sums: FloatArray = np.cumsum(values * weights, axis=-1)[..., -1]
    return sums


class _Round:
    """One decision: classify, score coarsely, take the best moves that hold when looked at closely."""

    def __init__(
        self,
        cluster: Cluster,
        settings: AresSettings,
        step_model: _StepModel,
        ahead: Forecast,
        limit: FloatArray,
        time: FloatArray,
        excess: FloatArray,
        beta: FloatArray,
    ) -> None:
        self.cluster, self.settings, self.step_model, self.ahead, self.beta = cluster, settings, step_model, ahead, beta
        self.limit, self.time, self.excess = limit, time, excess
        self.steps = ahead.grid.astype(np.float64)
        self.load = _dot(time, beta)
        self.mean = float(np.cumsum(self.load[cluster.open])[-1]) / int(cluster.open.sum())

    def decide(self) -> list[MigrationDecision]:
        """Return the moves, best first."""
        settings, cluster = self.settings, self.cluster
        pressure = _dot(self.excess, self.beta) / np.maximum(self.limit, 1.0)
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
        step_s = self.load[self.cluster.location[rows]] if self.step_model.known else np.full(len(rows), 0.02)
        rows = rows[_worth_the_transfer(self.cluster, rows, step_s, self.settings)]
        group = which[rows]
        order = np.argsort(group, kind="stable")
        return rows[order], group[order]

    def _coarse_gain(self, rows: IntArray, source: IntArray, targets: IntArray) -> FloatArray:
        """Score every pair on a few points of the horizon, shape (C, T)."""
        settings, step_model = self.settings, self.step_model
        points, beta = coarse_grid(settings.horizon, settings.points, settings.decay)
        alive, tokens = _curves(self.cluster, rows, self.steps[points])
        own = step_model.request[source][:, None] * alive + step_model.token[source][:, None] * tokens
        time = self.time[:, points]
        relief = _dot((2.0 * time.take(source, axis=0) - own) * own, beta)
        # Shape (C, T, P).
        more = (
            step_model.request[targets][:, None] * alive[:, None] + step_model.token[targets][:, None] * tokens[:, None]
        )
        burden = _dot((2.0 * time[targets] + more) * more, beta)
        excess = self.excess[:, points].take(source, axis=0)
        left = np.maximum(excess - tokens, 0.0)
        memory = _dot(excess * excess - left * left, beta)
        memory *= settings.memory_weight / np.maximum(self.limit[source], 1.0) ** 2
        gain: FloatArray = (relief[:, None] - burden) / (self.mean * self.mean) + memory[:, None]
        return gain

    def _take(
        self,
        rows: np.ndarray,
        which: np.ndarray,
        sources: np.ndarray,
        targets: np.ndarray,
        gain: np.ndarray,
        budget: int,
    ) -> list[MigrationDecision]:
        starts = np.flatnonzero(np.diff(which, prepend=-1))
        best = np.maximum.reduceat(gain, starts, axis=0)
        moves: list[MigrationDecision] = []
        tries = TRIES
        while len(moves) < budget and tries > 0:
            group, column = divmod(int(np.argmax(best)), best.shape[1])
            if best[group, column] <= self.settings.minimum_gain:
                break
            start = int(starts[group])
            end = int(starts[group + 1]) if group + 1 < len(starts) else len(rows)
            index = start + int(np.argmax(gain[start:end, column]))
            source, target = int(sources[which[index]]), int(targets[column])
            move = self._exact_gain(int(rows[index]), source, target)
            if move is None:
                tries -= 1
                gain[index, column] = -np.inf
                best[group, column] = gain[start:end, column].max()
                continue
            moves.append(move)
            best[group, :] = -np.inf
            best[:, column] = -np.inf
            best[:, targets == source] = -np.inf
            best[sources[which[starts]] == target, :] = -np.inf
        return moves

    def _exact_gain(self, row: int, source: int, target: int) -> MigrationDecision | None:
        settings, step_model, ahead = self.settings, self.step_model, self.ahead
        alive, tokens = (curve[0] for curve in _curves(self.cluster, np.array([row]), self.steps))
        variance = tokens * (self.cluster.resident_tokens[row] + self.steps - tokens)
        spread = np.sqrt(ahead.variance[target] + variance)
        allocated = self.cluster.resident_tokens[row] + self.steps
        if (block := self.cluster.block_tokens) > 1:
            allocated = np.ceil((allocated + 1.0) / block) * block
        peak = float((ahead.allocated[target] + alive * allocated + settings.deviations * spread).max())
        if peak > self.limit[target]:
            return None
        source_less = step_model.request[source] * alive + step_model.token[source] * tokens
        target_more = step_model.request[target] * alive + step_model.token[target] * tokens
        change = (2.0 * self.time[source] - source_less) * source_less - (
            2.0 * self.time[target] + target_more
        ) * target_more
        excess = self.excess[source]
        left = np.maximum(excess - tokens, 0.0)
        gain = float(_dot(change, self.beta)) / self.mean**2
        memory = float(_dot(excess * excess - left * left, self.beta)) / max(float(self.limit[source]), 1.0) ** 2
        gain += settings.memory_weight * memory
        if gain <= settings.minimum_gain:
            return None
        unit, factor = ("ms", 1e3) if step_model.known else ("tokens", 1.0)
        before = (self.load[source] * factor, self.load[target] * factor)
        after = (
            (self.load[source] - _dot(source_less, self.beta)) * factor,
            (self.load[target] + _dot(target_more, self.beta)) * factor,
        )
        cause = "memory" if excess.any() else "load"
        reason = (
            f"{cause}: source {before[0]:.4g} to {after[0]:.4g} {unit}, target {before[1]:.4g} to {after[1]:.4g}, "
            f"mean {self.mean * factor:.4g}; target peak {peak:.0f} of {self.limit[target]:.0f} tokens"
        )
        return MigrationDecision(request=row, source=source, target=target, gain=gain, reason=reason)


def decide_as_paper(cluster: Cluster, settings: PaperSettings) -> list[MigrationDecision]:
    """Decide by the same rule on the middle quantile alone, with tokens as load."""
    middle, remaining = len(cluster.levels) // 2, cluster.remaining_tokens
    left = None if remaining is None else remaining[:, middle : middle + 1]
    plain = replace(cluster, step_base_s=None, remaining_tokens=left, levels=(0.5,))
    return decide(plain, AresSettings(**asdict(settings), deviations=0.0, memory_weight=0.0))
