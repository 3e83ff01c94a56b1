"""The inner loops of `ares` (ares.py): sources, targets, and the pairs of request and target that gain most.

Plain loops over arrays, compiled where numba is installed. Importing this module imports numba.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ares.policy.compiling import compiled, inlined, keep_memory

F8 = NDArray[np.float64]
I8 = NDArray[np.int64]
B1 = NDArray[np.bool_]

NONE = -1
TRIES = 32
"""Pairs evaluated exactly in one decision, besides those that become moves."""


class Rows(NamedTuple):
    """The running requests: instance, resident tokens and whether each may move, shape (R,), quantiles, (R, Q)."""

    location: I8
    resident: I8
    movable: B1
    remaining: F8


class Pool(NamedTuple):
    """The instances, shape (I,): whether each is open, its limit in tokens, and its cost model of a step."""

    open: B1
    limit: F8
    base: F8
    request: F8
    token: F8


class Ahead(NamedTuple):
    """The forecast, shape (I, K), as in `ares.policy.forecast.Forecast`; `running` is its `count`."""

    expected: F8
    allocated: F8
    variance: F8
    running: F8


class Horizon(NamedTuple):
    """The steps ahead that are looked at.

    Attributes
    ----------
    steps, beta
        Steps ahead and the weight of each, shape (K,).
    coarse, coarse_beta
        Indices of the few points on which all pairs are scored, and the weight of each, shape (P,).
    weights
        Probability that each quantile of the remaining tokens stands for, shape (Q,).
    """

    steps: F8
    beta: F8
    coarse: I8
    coarse_beta: F8
    weights: F8


class PairSettings(NamedTuple):
    """Settings (`AresSettings`), as numbers.

    Attributes
    ----------
    theta, minimum_gain, deviations, memory_weight, sources, targets
        As there.
    block
        Tokens of a KV block; the target's memory is allocated in whole blocks.
    step_s
        Seconds of a step; 0: the load of an instance is in seconds.
    constant_s, token_s
        Seconds for which a request must be expected to keep running: a constant, and a part per resident token.
    """

    theta: float
    minimum_gain: float
    deviations: float
    memory_weight: float
    sources: int
    targets: int
    block: int
    step_s: float
    constant_s: float
    token_s: float


class Context(NamedTuple):
    """The arguments of one decision, the load of every instance and its memory beyond the limit, shape (I,) each."""

    rows: Rows
    pool: Pool
    ahead: Ahead
    horizon: Horizon
    settings: PairSettings
    mean: float
    load: F8
    pressure: F8


@compiled
def choose_moves(
    rows: tuple[I8, I8, B1, F8],
    pool: tuple[B1, F8, F8, F8, F8],
    ahead: tuple[F8, F8, F8, F8],
    horizon: tuple[F8, F8, I8, F8, F8],
    settings: tuple[float, float, float, float, int, int, int, float, float, float],
    pairs: I8,
    numbers: F8,
) -> int:
    """Choose the moves of one period, best first; return how many.

    Parameters
    ----------
    rows, pool, ahead, horizon, settings
        The fields of `Rows`, `Pool`, `Ahead`, `Horizon` and `PairSettings`: a plain tuple is handed over faster.
    pairs, numbers
        Results, shape (moves at most, 3) and (..., 8): row, source, target; gain, peak of the target's memory, what the
        source loses and the target gains of its load, the load of both, the mean load, and the weighted tokens by which
        the source's memory exceeds its limit.
    """
    instances = Pool(*pool)
    load, pressure = np.empty(len(instances.limit)), np.empty(len(instances.limit))
    mean = _loads(instances, Ahead(*ahead), Horizon(*horizon), PairSettings(*settings).deviations, load, pressure)
    context = Context(
        Rows(*rows), instances, Ahead(*ahead), Horizon(*horizon), PairSettings(*settings), mean, load, pressure
    )
    sources = _sources(context, max(context.settings.sources, len(pairs)))
    targets = _targets(context, max(context.settings.targets, len(pairs)))
    if len(sources) == 0 or len(targets) == 0:
        return 0
    candidates, starts = _candidates(context, sources)
    if len(candidates) == 0:
        return 0
    gain = _coarse_gain(context, candidates, targets)
    return _choose_pairs(context, candidates, starts, sources, targets, gain, pairs, numbers)


@inlined
def _loads(pool: Pool, ahead: Ahead, horizon: Horizon, deviations: float, load: F8, pressure: F8) -> float:
    """Write the load of every instance and its memory beyond the limit; return the mean load of the open ones."""
    total, open_ones = 0.0, 0
    points = len(horizon.beta)
    step, excess = np.empty(points), np.empty(points)
    for instance in range(len(load)):
        base, request, token = pool.base[instance], pool.request[instance], pool.token[instance]
        most = pool.limit[instance]
        # Two loops: the first has no order to keep, and is done eight points at a time.
        for point in range(points):
            alone = request * ahead.running[instance, point] + base
            step[point] = (alone + token * ahead.expected[instance, point]) * horizon.beta[point]
            high = np.sqrt(ahead.variance[instance, point]) * deviations + ahead.allocated[instance, point]
            excess[point] = max(high - most, 0.0) * horizon.beta[point]
        seconds, beyond = 0.0, 0.0
        for point in range(points):
            seconds += step[point]
            beyond += excess[point]
        load[instance], pressure[instance] = seconds, beyond
        if pool.open[instance]:
            total += seconds
            open_ones += 1
    return total / max(open_ones, 1)


@inlined
def _step_s(context: Context, instance: int, point: int) -> float:
    """Return how long a step of an instance takes at a point of the horizon."""
    pool, ahead = context.pool, context.ahead
    alone = pool.request[instance] * ahead.running[instance, point] + pool.base[instance]
    return float(alone + pool.token[instance] * ahead.expected[instance, point])


@inlined
def _excess(context: Context, instance: int, point: int) -> float:
    """Return by how many tokens a high quantile of an instance's memory exceeds its limit at a point."""
    high = (
        np.sqrt(context.ahead.variance[instance, point]) * context.settings.deviations
        + context.ahead.allocated[instance, point]
    )
    return float(max(high - context.pool.limit[instance], 0.0))


@compiled
def _largest(key: F8, most: int) -> I8:
    """Return the indices of the largest keys, the largest first, the lowest index among equals; -inf is none."""
    chosen = np.empty(min(most, len(key)), np.int64)
    for place in range(len(chosen)):
        best = 0
        for index in range(len(key)):
            if key[index] > key[best]:
                best = index
        if not key[best] > -np.inf:
            return chosen[:place]
        chosen[place] = best
        key[best] = -np.inf
    return chosen


@inlined
def _sources(context: Context, most: int) -> I8:
    """Return the open instances with too much load, or too much memory ahead, the worst first."""
    key = np.full(len(context.load), -np.inf)
    for instance in range(len(key)):
        pressure = context.pressure[instance] / max(context.pool.limit[instance], 1.0)
        over = context.load[instance] > (1.0 + context.settings.theta) * context.mean or pressure > 0.0
        if context.pool.open[instance] and over and context.mean > 0.0:
            key[instance] = context.load[instance] / context.mean + context.settings.memory_weight * pressure
    return _largest(key, most)


@inlined
def _targets(context: Context, most: int) -> I8:
    """Return the open instances with less than the mean load, the least loaded first."""
    key = np.full(len(context.load), -np.inf)
    for instance in range(len(key)):
        if context.pool.open[instance] and context.load[instance] < context.mean:
            key[instance] = -context.load[instance]
    return _largest(key, most)


@inlined
def _candidates(context: Context, sources: I8) -> tuple[I8, I8]:
    """Return the movable rows that run for long enough, grouped by source, and where each group begins."""
    rows, settings = context.rows, context.settings
    middle = rows.remaining.shape[1] // 2
    position = np.full(len(context.load), NONE)
    for place in range(len(sources)):
        position[sources[place]] = place
    found, starts = np.empty(len(rows.location), np.int64), np.zeros(len(sources) + 1, np.int64)
    count = 0
    for row in range(len(rows.location)):
        group = position[rows.location[row]]
        if group == NONE or not rows.movable[row]:
            continue
        step_s = settings.step_s if settings.step_s > 0.0 else context.load[rows.location[row]]
        # NaN, one without a prediction, runs on.
        if rows.remaining[row, middle] * step_s <= settings.constant_s + settings.token_s * rows.resident[row]:
            continue
        found[count] = row
        count += 1
        starts[group + 1] += 1
    for group in range(len(sources)):
        starts[group + 1] += starts[group]
    candidates, following = np.empty(count, np.int64), starts.copy()
    for row in found[:count]:
        group = position[rows.location[row]]
        candidates[following[group]] = row
        following[group] += 1
    return candidates, starts


@inlined
def _alive(context: Context, row: int, step: float) -> float:
    """Return the probability that a request still runs in so many steps."""
    alive = 0.0
    for quantile in range(len(context.horizon.weights)):
        if not context.rows.remaining[row, quantile] <= step:  # NaN outlasts every step
            alive += context.horizon.weights[quantile]
    return alive


@inlined
def _coarse_gain(context: Context, candidates: I8, targets: I8) -> F8:
    """Score every pair of request and target on a few points of the horizon, shape (C, T)."""
    rows, pool, horizon, settings = context.rows, context.pool, context.horizon, context.settings
    few = len(horizon.coarse)
    twice = np.empty((few, len(targets)))
    per_request, per_token = pool.request[targets], pool.token[targets]
    for index in range(few):
        for column in range(len(targets)):
            twice[index, column] = 2.0 * _step_s(context, targets[column], horizon.coarse[index])
    gain = np.empty((len(candidates), len(targets)))
    burden = np.empty(len(targets))
    square = context.mean * context.mean
    for candidate in range(len(candidates)):
        row = candidates[candidate]
        source = rows.location[row]
        burden[:] = 0.0
        relief, memory = 0.0, 0.0
        for index in range(few):
            point, beta = horizon.coarse[index], horizon.coarse_beta[index]
            alive = _alive(context, row, horizon.steps[point])
            tokens = alive * (float(rows.resident[row]) + horizon.steps[point])
            less = pool.request[source] * alive + pool.token[source] * tokens
            relief += (2.0 * _step_s(context, source, point) - less) * less * beta
            excess = _excess(context, source, point)
            left = max(excess - tokens, 0.0)
            memory += (excess * excess - left * left) * beta
            for column in range(len(targets)):
                more = per_request[column] * alive + per_token[column] * tokens
                burden[column] += (twice[index, column] + more) * more * beta
        memory *= settings.memory_weight / max(pool.limit[source], 1.0) ** 2
        for column in range(len(targets)):
            gain[candidate, column] = (relief - burden[column]) / square + memory
            if targets[column] == source:
                gain[candidate, column] = -np.inf
    return gain


@inlined
def _choose_pairs(
    context: Context, candidates: I8, starts: I8, sources: I8, targets: I8, gain: F8, pairs: I8, numbers: F8
) -> int:
    """Choose pairs greedily, best first, each evaluated on every point of the horizon; return how many.

    One move leaves a source and one enters a target, and no instance does both. A pair that gains too little, or takes
    the target beyond its limit, costs one of the tries. `gain` is overwritten.
    """
    best = np.full((len(sources), len(targets)), -np.inf)
    for group in range(len(sources)):
        for column in range(len(targets)):
            best[group, column] = _most(gain, column, starts[group], starts[group + 1])
    taken, tries = 0, TRIES
    while taken < len(pairs) and tries > 0:
        place = int(np.argmax(best))
        group, column = place // len(targets), place % len(targets)
        if best[group, column] <= context.settings.minimum_gain:
            break
        index = starts[group]
        for candidate in range(starts[group], starts[group + 1]):
            if gain[candidate, column] > gain[index, column]:
                index = candidate
        row, source, target = candidates[index], sources[group], targets[column]
        score, peak, source_less, target_more = _exact_gain(context, row, source, target)
        if peak > context.pool.limit[target] or score <= context.settings.minimum_gain:
            tries -= 1
            gain[index, column] = -np.inf
            best[group, column] = _most(gain, column, starts[group], starts[group + 1])
            continue
        pairs[taken, 0], pairs[taken, 1], pairs[taken, 2] = row, source, target
        numbers[taken, 0], numbers[taken, 1], numbers[taken, 2], numbers[taken, 3] = (
            score,
            peak,
            source_less,
            target_more,
        )
        numbers[taken, 4], numbers[taken, 5], numbers[taken, 6] = (
            context.load[source],
            context.load[target],
            context.mean,
        )
        numbers[taken, 7] = context.pressure[source]
        taken += 1
        best[group, :] = -np.inf
        best[:, column] = -np.inf
        best[sources == target, :] = -np.inf
        best[:, targets == source] = -np.inf
    return taken


@compiled
def _most(gain: F8, column: int, start: int, end: int) -> float:
    """Return the largest gain of some candidates at a target; -inf where there are none."""
    most = -np.inf
    for candidate in range(start, end):
        most = max(most, gain[candidate, column])
    return most


@inlined
def _exact_gain(context: Context, row: int, source: int, target: int) -> tuple[float, float, float, float]:
    """Return the gain of a move over the whole horizon and the peak of the target's memory.

    And by how much the load of the source falls and that of the target rises.
    """
    rows, pool, ahead, horizon, settings = context.rows, context.pool, context.ahead, context.horizon, context.settings
    change, memory, peak, source_less, target_more = 0.0, 0.0, -np.inf, 0.0, 0.0
    for point in range(len(horizon.steps)):
        beta, alive = horizon.beta[point], _alive(context, row, horizon.steps[point])
        reach = float(rows.resident[row]) + horizon.steps[point]
        tokens = alive * reach
        spread = np.sqrt(ahead.variance[target, point] + tokens * (reach - tokens))
        own = np.ceil((reach + 1.0) / settings.block) * settings.block if settings.block > 1 else reach
        peak = max(peak, ahead.allocated[target, point] + alive * own + settings.deviations * spread)
        less = pool.request[source] * alive + pool.token[source] * tokens
        more = pool.request[target] * alive + pool.token[target] * tokens
        relief = (2.0 * _step_s(context, source, point) - less) * less - (
            2.0 * _step_s(context, target, point) + more
        ) * more
        beyond = _excess(context, source, point)
        rest = max(beyond - tokens, 0.0)
        change += relief * beta
        memory += (beyond * beyond - rest * rest) * beta
        source_less += less * beta
        target_more += more * beta
    score = change / (context.mean * context.mean) + settings.memory_weight * (
        memory / max(pool.limit[source], 1.0) ** 2
    )
    return score, peak, source_less, target_more


def prepare() -> None:
    """Compile what the first decision would otherwise wait for: some seconds, or load it from the cache."""
    keep_memory()
    none, no_rows, empty = np.zeros(0), np.zeros(0, np.int64), np.zeros((0, 1))
    closed, one, point = np.zeros(0, np.bool_), np.ones(1), np.zeros(1, np.int64)
    choose_moves(
        (no_rows, no_rows, closed, empty),
        (closed, none, none, none, none),
        (empty, empty, empty, empty),
        (one, one, point, one, one),
        (0.0, 0.0, 0.0, 0.0, 0, 0, 1, 0.0, 0.0, 0.0),
        np.zeros((0, 3), np.int64),
        np.zeros((0, 8)),
    )
