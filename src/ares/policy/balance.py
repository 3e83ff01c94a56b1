"""Rebalancing on the forecast: the `ares` rule, and the paper's as a special case of it.

The load of an instance k steps ahead is the time of its decode step then: base + request x running + token x resident
(plain resident tokens where no law is known). The objective is the sum over instances and horizon of beta_k load^2,
which for equal instances is their variance, plus a penalty on memory: the square of what a high quantile of resident
tokens exceeds the capacity by. Moving request r from s to d, with own load a_s(k) and a_d(k), changes the first term by

    sum_k beta_k (-2 load_s a_s + a_s^2 + 2 load_d a_d + a_d^2),

linear in the loads, so one matrix product scores every (request, target) pair of a source.

Only pairs that can matter are scored: the few worst sources by (1 + theta) times the mean, the few best targets, and
of a source the rows whose own load could bring a gain. The forecast itself is one pass over all rows.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ares.policy.cluster import Cluster
from ares.policy.forecast import FloatArray, Forecast, forecast, geometric_grid, quantile_weights
from ares.policy.moves import Move, RebalanceSettings

IntArray = NDArray[np.int64]


@dataclass(slots=True)
class _Loads:
    """The mutable part of one round: what each instance is forecast to carry, shape (I, K)."""

    time: FloatArray
    expected: FloatArray
    variance: FloatArray
    limit: FloatArray  # memory that may be filled, shape (I,)

    def excess(self, instances: IntArray, deviations: float) -> FloatArray:
        high = self.expected[instances] + deviations * np.sqrt(np.maximum(self.variance[instances], 0.0))
        return np.maximum(high - self.limit[instances][:, None], 0.0)


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Rows of one source that may move, with their own curves, shape (C, K)."""

    rows: IntArray
    alive: FloatArray
    tokens: FloatArray
    variance: FloatArray


def horizon_weights(grid: IntArray, decay: float) -> FloatArray:
    """Weights of the grid points: each stands for the steps up to the next, discounted by 1 / (1 + k / decay)."""
    width = np.diff(np.append(grid, grid[-1] + max(grid[-1] - grid[-2], 1) if len(grid) > 1 else 1)).astype(np.float64)
    beta = width / (1.0 + grid / decay)
    beta /= (1.0 + grid / decay)
    return beta / beta.sum()


def _law(cluster: Cluster) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Step law of every instance, or plain tokens where none is known."""
    count = len(cluster.instances)
    if cluster.step_base_s is None or cluster.step_request_s is None or cluster.step_token_s is None:
        return np.zeros(count), np.zeros(count), np.ones(count)
    return cluster.step_base_s, cluster.step_request_s, cluster.step_token_s


def _candidates(cluster: Cluster, rows: IntArray, grid: IntArray) -> _Candidates:
    steps = grid.astype(np.float64)
    resident = cluster.resident_tokens[rows].astype(np.float64)
    alive = np.zeros((len(rows), len(grid)))
    if cluster.remaining_tokens is None:
        alive += 1.0
    else:
        for atom, weight in enumerate(quantile_weights(cluster.levels)):
            left = np.nan_to_num(cluster.remaining_tokens[rows, atom], nan=np.inf)
            alive += weight * (left[:, None] > steps)
    tokens = alive * (resident[:, None] + steps)
    return _Candidates(rows, alive, tokens, tokens * (1.0 - alive) * (resident[:, None] + steps))


def _worth_the_transfer(cluster: Cluster, rows: IntArray, step_s: float, settings: RebalanceSettings) -> IntArray:
    """Drop rows that are likely to end before their transfer has paid off (phase 2 of the paper)."""
    if cluster.remaining_tokens is None:
        return rows
    left = cluster.remaining_tokens[rows, len(cluster.levels) // 2]
    transfer_s = cluster.resident_tokens[rows] * cluster.token_bytes / cluster.transfer_bytes_s
    worth = np.nan_to_num(left, nan=np.inf) * step_s > settings.amortise * (transfer_s + settings.stall_s)
    return rows[worth]


def ares(cluster: Cluster, settings: RebalanceSettings) -> list[Move]:
    """Decide the moves of one period; see the module's docstring for the rule."""
    if len(cluster.location) == 0 or int(cluster.open.sum()) < 2:
        return []
    grid = geometric_grid(settings.horizon, settings.points)
    beta = horizon_weights(grid, settings.decay)
    ahead = forecast(cluster, grid)
    base, per_request, per_token = _law(cluster)
    time = base[:, None] + per_request[:, None] * ahead.count + per_token[:, None] * ahead.expected
    limit = cluster.capacity_tokens * (1.0 - settings.reserve)
    loads = _Loads(time, ahead.expected, ahead.variance, limit)
    return _select(cluster, settings, grid, beta, loads, ahead)


def _select(
    cluster: Cluster, settings: RebalanceSettings, grid: IntArray, beta: FloatArray, loads: _Loads, ahead: Forecast
) -> list[Move]:
    base, per_request, per_token = _law(cluster)
    instances = np.arange(len(cluster.instances))
    open_ = cluster.open
    load = loads.time @ beta
    mean = float(load[open_].mean())
    excess = (loads.excess(instances, settings.deviations) / np.maximum(loads.limit, 1.0)[:, None]) @ beta
    over = open_ & ((load > (1.0 + settings.theta) * mean) | (excess > 0.0))
    order = np.lexsort((-load, -excess))
    sources = order[over[order]][: settings.sources]
    if not len(sources):
        return []
    targets = np.argsort(load, kind="stable")
    # Under balance of step time a memory-full instance may be a bad target and an emptier, slower one a good one.
    targets = targets[(open_ & (load < mean))[targets]][: settings.targets]
    budget = max(settings.moves_per_round, len(instances) // 32)
    scale = mean * mean
    inbound: dict[int, int] = {}
    used_sources: dict[int, int] = {}
    moves: list[Move] = []
    pool: dict[int, _Candidates] = {}
    wanted = np.zeros(len(instances), np.bool_)
    wanted[sources] = True
    mine = np.flatnonzero(wanted[cluster.location] & cluster.movable)
    owner = cluster.location[mine]
    for source in sources.tolist():
        rows = _worth_the_transfer(cluster, mine[owner == source], float(base[source] + load[source]), settings)
        if len(rows):
            pool[source] = _candidates(cluster, rows, grid)
    scores: dict[int, tuple[float, int, int]] = {}
    while len(moves) < budget and pool:
        for source in [name for name in pool if name not in scores]:
            scores[source] = _best(cluster, settings, beta, loads, pool[source], source, targets, inbound, scale)
        source = max(scores, key=lambda name: scores[name][0])
        gain, index, target = scores[source]
        if gain <= settings.minimum_gain:
            break
        chosen = pool[source]
        row = int(chosen.rows[index])
        before = (float(loads.time[source] @ beta), float(loads.time[target] @ beta))
        for instance, sign in ((source, -1.0), (target, 1.0)):
            loads.expected[instance] += sign * chosen.tokens[index]
            loads.variance[instance] += sign * chosen.variance[index]
            loads.time[instance] += sign * (
                per_request[instance] * chosen.alive[index] + per_token[instance] * chosen.tokens[index]
            )
        after = (float(loads.time[source] @ beta), float(loads.time[target] @ beta))
        unit = "tokens" if cluster.step_base_s is None else "ms"
        factor = 1.0 if cluster.step_base_s is None else 1e3
        peak = float(loads.expected[target].max())
        cause = "memory" if excess[source] > 0.0 else "load"
        moves.append(
            Move(
                request=row,
                source=source,
                target=target,
                gain=gain,
                reason=(
                    f"{cause}: source {before[0] * factor:.4g} to {after[0] * factor:.4g} {unit}, target "
                    f"{before[1] * factor:.4g} to {after[1] * factor:.4g}, mean {mean * factor:.4g}; "
                    f"target peak {peak:.0f} of {loads.limit[target]:.0f} tokens"
                ),
            )
        )
        inbound[target] = inbound.get(target, 0) + 1
        used_sources[source] = used_sources.get(source, 0) + 1
        keep = np.arange(len(chosen.rows)) != index
        pool[source] = _Candidates(chosen.rows[keep], chosen.alive[keep], chosen.tokens[keep], chosen.variance[keep])
        # No reverse pair in a round, and a cap on moves in flight on each side.
        targets = targets[targets != source]
        if used_sources[source] >= settings.moves_per_instance or not len(pool[source]):
            del pool[source]
        scores = {name: score for name, score in scores.items() if name != source and score[2] != target}
    return moves


def _best(
    cluster: Cluster,
    settings: RebalanceSettings,
    beta: FloatArray,
    loads: _Loads,
    candidates: _Candidates,
    source: int,
    targets: IntArray,
    inbound: dict[int, int],
    scale: float,
) -> tuple[float, int, int]:
    """Return the best (gain, candidate, target) of one source, the gain relative to the mean load squared."""
    _, per_request, per_token = _law(cluster)
    free = [int(t) for t in targets if t != source and inbound.get(int(t), 0) < settings.moves_per_instance]
    where = np.asarray(free, np.int64)
    if not len(where):
        return (-np.inf, 0, 0)
    own = per_request[source] * candidates.alive + per_token[source] * candidates.tokens
    relief = 2.0 * own @ (beta * loads.time[source]) - (own * own) @ beta
    same = np.all(per_token[where] == per_token[source]) and np.all(per_request[where] == per_request[source])
    weighted = (beta * loads.time[where]).T
    if same:
        burden = 2.0 * own @ weighted + ((own * own) @ beta)[:, None]
    else:
        linear, count = candidates.tokens, candidates.alive
        burden = 2.0 * (linear @ weighted * per_token[where] + count @ weighted * per_request[where])
        cross = 2.0 * ((linear * count) @ beta)[:, None] * (per_token * per_request)[where]
        squares = ((linear * linear) @ beta)[:, None] * per_token[where] ** 2
        burden += squares + cross + ((count * count) @ beta)[:, None] * per_request[where] ** 2
    gain = (relief[:, None] - burden) / scale
    excess = loads.excess(np.array([source]), settings.deviations)[0]
    if excess.any():
        left = np.maximum(excess - candidates.tokens, 0.0)
        limit = max(float(loads.limit[source]), 1.0)
        gain += settings.memory_weight * (((excess * excess - left * left) @ beta) / limit**2)[:, None]
    # I6: the target's high quantile of memory, with the request, stays below its limit over the whole horizon.
    gain[~_fits(settings, loads, candidates, where, gain)] = -np.inf
    index, column = np.unravel_index(int(np.argmax(gain)), gain.shape)
    return float(gain[index, column]), int(index), int(where[column])


def _fits(
    settings: RebalanceSettings, loads: _Loads, candidates: _Candidates, where: IntArray, gain: FloatArray
) -> NDArray[np.bool_]:
    """Tell which pairs hold I6; only pairs that gain anything are looked at, best first, until one fits."""
    fits = np.zeros(gain.shape, np.bool_)
    flat = gain.ravel()
    order = np.flatnonzero(flat > settings.minimum_gain)
    order = order[np.argsort(-flat[order], kind="stable")][:64]
    rows, columns = np.unravel_index(order, gain.shape)
    chosen = where[columns]
    spread = np.sqrt(np.maximum(loads.variance[chosen] + candidates.variance[rows], 0.0))
    high = loads.expected[chosen] + candidates.tokens[rows] + settings.deviations * spread
    fits[rows, columns] = (high <= loads.limit[chosen][:, None]).all(axis=1)
    return fits


def paper(cluster: Cluster, settings: RebalanceSettings) -> list[Move]:
    """The paper's rule: point predictions, resident tokens as load, no view of memory but the target's limit."""
    plain = replace(
        cluster,
        step_base_s=None,
        step_request_s=None,
        step_token_s=None,
        remaining_tokens=None
        if cluster.remaining_tokens is None
        else cluster.remaining_tokens[:, len(cluster.levels) // 2 : len(cluster.levels) // 2 + 1],
        levels=(0.5,),
    )
    return ares(plain, replace(settings, deviations=0.0, memory_weight=0.0))
