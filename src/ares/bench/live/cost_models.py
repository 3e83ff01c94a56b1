"""Cost models fitted to one recorded run, from the times at which its clients got every token.

The gateway's own fit (gateway/control/cost_models.py) leaves out steps between two telemetry reports in which requests
joined or left, and the delivery of the stream; the time between two tokens at the client includes both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ares.bench.live.saved import SavedRun
from ares.bench.live.spread import Spread

FloatArray = NDArray[np.float64]

# Tokens whose times are averaged into one observation, against the jitter of single ones.
_WINDOW = 16
# A pause this many times as long as the usual one is a stop (preemption, recomputation, a move), not a step.
_STOP = 6.0
# Prefills and hand-overs that took more than this many times a quick one also waited for memory. Under heavy load most
# wait, so that a quick one is at the first quartile, not at the median.
_UNUSUAL, _QUICK = 3.0, 25
# Fewest observations for a fit.
_LEAST_WINDOWS, _LEAST_REQUESTS = 10, 8
# Steps in a stop of a simulated stream: half of the one that runs at the target, and the one that brings the token.
_STEPS_OF_A_STOP, _STEPS_WHERE_IDLE = 1.5, 1.0


class FitError(ValueError):
    """A run with too few observations to fit cost models to."""


@dataclass(frozen=True, slots=True)
class CostModels:
    """The fitted models of a run, in seconds.

    Attributes
    ----------
    steps
        Base, cost of a request and cost of a resident token of a step, for each decode instance, shape (D, 3).
    prefill_base_s, prefill_token_s
        From the arrival of a prompt at an idle prefill instance to its first token at the client.
    prefill_spread_s
        Residuals of that model, one for each request that it was fitted to.
    hand_over_s
        From the first token until the request may join a step of its decode instance, without the steps of others.
    move_s
        From the last token at the source until it may join a step at the target; None where nothing moved.
    """

    steps: FloatArray
    prefill_base_s: float
    prefill_token_s: float
    prefill_spread_s: FloatArray
    hand_over_s: float
    move_s: float | None


@dataclass(frozen=True, slots=True)
class _Windows:
    """Observations of steps, shape (W,): request, instance, features (W, 3) and mean seconds."""

    request: NDArray[np.int64]
    instance: NDArray[np.int64]
    features: FloatArray
    seconds: FloatArray


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Every pause between two tokens of a stream in decode, shape (N,); `at` is its end."""

    request: NDArray[np.int64]
    instance: NDArray[np.int64]
    at: FloatArray
    pause: FloatArray
    resident: FloatArray


class Observations:
    """The observations of a run; `fit` may be called for any resampling of its requests.

    Parameters
    ----------
    run
        The run.

    Raises
    ------
    FitError
        There are too few of them.
    """

    def __init__(self, run: SavedRun) -> None:
        self.run = run
        self.names = [row.name for row in run.instances if row.role != "prefill"]
        self.prefills = max(sum(row.role == "prefill" for row in run.instances), 1)
        self.times = [np.array(request.times_s) for request in run.requests]
        if len(self.times) < _LEAST_REQUESTS:
            raise FitError(f"{run.preset}: {len(self.times)} completed requests are too few to fit cost models to")
        tokens = self._every_token()
        if not len(tokens.pause):
            raise FitError(f"{run.preset}: no request had more than two tokens")
        usual = float(np.median(tokens.pause))
        going = tokens.pause <= _STOP * usual
        self._tokens, self._going = tokens, going & (tokens.instance >= 0)
        self._features = _features(tokens, self._going, len(self.names))
        self._windows = _windows(tokens, self._going, self._features)
        if len(self._windows.seconds) < _LEAST_WINDOWS:
            raise FitError(
                f"{run.preset}: {len(self._windows.seconds)} windows of steps are too few to fit a step time model to"
            )
        self._prompts, self._services = self._prefill_times()
        self._unqueued = _without_waiting(self._prompts, self._services)
        self._hand_overs, self._busy = self._hand_over_times()
        self._stalls = np.array([move.stall_s for move in run.moves if move.outcome == "moved" and move.stall_s])

    def fit(self, chosen: NDArray[np.int64] | None = None) -> CostModels:
        """Fit to the requests in `chosen`, which may name some more than once; by default to all of them."""
        windows = self._windows
        count = len(self.times)
        weight = np.bincount(chosen, minlength=count).astype(float) if chosen is not None else np.ones(count)
        each = weight[windows.request]
        everywhere = _fit_nonnegative(windows.features, windows.seconds, each)
        steps = np.empty((len(self.names), 3))
        for instance in range(len(steps)):
            here = (windows.instance == instance) & (each > 0)
            enough = here.sum() >= _LEAST_WINDOWS
            steps[instance] = (
                _fit_nonnegative(windows.features[here], windows.seconds[here], each[here]) if enough else everywhere
            )
        kept = self._unqueued
        base, token, spread = _line(self._prompts[kept], self._services[kept], weight[kept])
        step = float(np.average(windows.seconds, weights=each))
        late = self._hand_overs - np.where(self._busy, _STEPS_OF_A_STOP, _STEPS_WHERE_IDLE) * step
        usual = late[self._hand_overs <= _ordinary(self._hand_overs)]
        return CostModels(
            steps=steps,
            prefill_base_s=base,
            prefill_token_s=token,
            prefill_spread_s=spread,
            hand_over_s=max(float(usual.mean()), 1e-4),
            move_s=max(float(self._stalls.mean()) - _STEPS_OF_A_STOP * step, 1e-4) if len(self._stalls) else None,
        )

    def resampled(self, generator: np.random.Generator) -> CostModels:
        """Fit to as many requests, drawn with replacement: the uncertainty of the models from one run."""
        count = len(self.times)
        return self.fit(generator.integers(0, count, count))

    def spread(self, models: CostModels) -> Spread:
        """Return the residuals of the streams."""
        tokens, going = self._tokens, self._going
        rows = []
        for number, times in enumerate(self.times):
            own = np.flatnonzero(going & (tokens.request == number))
            if len(own):
                expected = np.einsum("ij,ij->i", self._features[own], models.steps[tokens.instance[own]])
                pauses = tokens.pause[own]
                rows.append((len(times), float(pauses.sum() / expected.sum()), float(pauses.max())))
        length, factor, pause = (np.array(column) for column in zip(*sorted(rows), strict=True))
        usual = _ordinary(self._hand_overs)
        step = float(self._windows.seconds.mean())
        # The simulator begins a pull at the end of a step, and takes the request in at the end of the one in which it
        # ends.
        whole = max(np.ceil(models.hand_over_s / step), 1.0) + _STEPS_OF_A_STOP
        modelled = np.where(self._busy, whole * step, models.hand_over_s + _STEPS_WHERE_IDLE * step)
        return Spread(length, factor, pause, (self._hand_overs - modelled)[self._hand_overs <= usual], usual)

    def _every_token(self) -> _Tokens:
        rows = []
        for number, (request, times) in enumerate(zip(self.run.requests, self.times, strict=True)):
            # The first pause is the hand-over from prefill.
            if len(times) > 2:
                at, resident = times[2:], request.prompt_tokens + np.arange(2, len(times))
                where = self._where(request.name, at)
                rows.append((np.full(len(at), number), where, at, np.diff(times[1:]), resident))
        if not rows:
            none = np.zeros(0)
            return _Tokens(none.astype(np.int64), none.astype(np.int64), none, none, none)
        stream, instance, at, pause, resident = (np.concatenate(column) for column in zip(*rows, strict=True))
        return _Tokens(stream, instance, at, pause, resident.astype(float))

    def _hand_over_times(self) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Return seconds from the first to the second token, and whether the instance was running others then."""
        tokens, seconds, busy = self._tokens, [], []
        for number, times in enumerate(self.times):
            if len(times) > 1:
                place = self._where(self.run.requests[number].name, times[1:2])[0]
                others = self._going & (tokens.instance == place) & (tokens.request != number)
                running = others & (tokens.at > times[0]) & (tokens.at - tokens.pause <= times[0])
                seconds.append(times[1] - times[0])
                busy.append(bool(running.any()))
        return np.array(seconds), np.array(busy)

    def _where(self, name: str, at: FloatArray) -> NDArray[np.int64]:
        """Return the instance at each moment, by the sample before it; -1 where none shows the request."""
        seen = [
            (sample.at_s, self.names.index(place))
            for sample in self.run.samples
            if (place := sample.where[name].instance if name in sample.where else None) in self.names
        ]
        if not seen:
            return np.full(len(at), -1)
        moments, places = zip(*seen, strict=True)
        index = np.searchsorted(np.array(moments), at, side="right") - 1
        found: NDArray[np.int64] = np.array(places)[np.maximum(index, 0)]
        return found

    def _prefill_times(self) -> tuple[FloatArray, FloatArray]:
        """Return prompt tokens, and seconds to the first token; NaN where it waited for admission or behind others.

        Prompts that wait are computed together in one step, which does not show the time of a single one.
        """
        # Runs that were saved by version 0.1 call it "held".
        states = {"waiting", "held"}
        waited = {name for sample in self.run.samples for name, seen in sample.where.items() if seen.state in states}
        free = np.zeros(self.prefills)
        prompts, services = np.empty(len(self.times)), np.full(len(self.times), np.nan)
        for number, (request, times) in enumerate(zip(self.run.requests, self.times, strict=True)):
            prompts[number] = request.prompt_tokens
            if request.name in waited:
                continue
            first, earliest = float(times[0]), int(np.argmin(free))
            if free[earliest] <= request.at_s:
                services[number] = first - request.at_s
            free[earliest] = max(free[earliest], first)
        return prompts, services


def _features(tokens: _Tokens, going: NDArray[np.bool_], instances: int) -> FloatArray:
    """Return 1, running requests and resident tokens of the instance in each pause, shape (N, 3)."""
    features = np.ones((len(tokens.pause), 3))
    for instance in range(instances):
        here = going & (tokens.instance == instance)
        features[here, 1:] = _load(tokens, here)
    return features


def _without_waiting(prompts: FloatArray, seconds: FloatArray) -> NDArray[np.int64]:
    """Return the prefills that did not wait: those within a few times of a quick one of their length.

    A quick one is found by regression of the quartile, base + slope x tokens, neither negative.
    """
    from scipy.optimize import linprog

    known = np.flatnonzero(np.isfinite(seconds))
    count = len(known)
    if not count:
        return known
    share, tokens = _QUICK / 100.0, prompts[known]
    scale = tokens.mean()
    within = np.hstack([np.ones((count, 1)), (tokens / scale)[:, None], np.eye(count), -np.eye(count)])
    cost = np.concatenate([np.zeros(2), np.full(count, share), np.full(count, 1.0 - share)])
    base, slope = linprog(cost, A_eq=within, b_eq=seconds[known]).x[:2]
    kept: NDArray[np.int64] = known[seconds[known] <= _UNUSUAL * (base + slope * tokens / scale)]
    return kept


def _ordinary(seconds: FloatArray) -> float:
    """Return the longest time that is still taken as work without waiting."""
    known = seconds[np.isfinite(seconds)]
    return _UNUSUAL * float(np.percentile(known, _QUICK)) if len(known) else 0.0


def _windows(tokens: _Tokens, going: NDArray[np.bool_], features: FloatArray) -> _Windows:
    """Average the pauses of each stream over some tokens, with the load of its instance meanwhile."""
    rows = []
    for request in np.unique(tokens.request[going]):
        own = np.flatnonzero(going & (tokens.request == request))
        for begin in range(0, len(own), _WINDOW):
            some = own[begin : begin + _WINDOW]
            if len(some) == _WINDOW or (begin == 0 and len(some) >= _WINDOW // 2):
                rows.append((request, tokens.instance[some[0]], features[some].mean(axis=0), tokens.pause[some].mean()))
    if not rows:
        return _Windows(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3)), np.zeros(0))
    request_column, instance_column, feature_rows, seconds = zip(*rows, strict=True)
    return _Windows(
        np.array(request_column), np.array(instance_column), np.array(feature_rows), np.array(seconds, dtype=float)
    )


def _load(tokens: _Tokens, here: NDArray[np.bool_]) -> FloatArray:
    """Return how many requests ran, and with how many resident tokens, in the middle of each pause, shape (N, 2)."""
    begin, end = tokens.at[here] - tokens.pause[here], tokens.at[here]
    resident = tokens.resident[here]
    moments = np.concatenate([begin, end])
    changes = np.concatenate(
        [np.stack([np.ones_like(begin), resident], 1), np.stack([-np.ones_like(end), -resident], 1)]
    )
    order = np.argsort(moments, kind="stable")
    running = np.cumsum(changes[order], axis=0)
    index = np.searchsorted(moments[order], (begin + end) / 2.0, side="right") - 1
    found: FloatArray = running[index]
    return found


def _fit_nonnegative(features: FloatArray, seconds: FloatArray, weight: FloatArray) -> FloatArray:
    """Fit non-negative coefficients by least squares; with a base, the errors have a mean of zero."""
    from scipy.optimize import nnls

    scale = np.maximum(features.mean(axis=0), 1e-9)
    root = np.sqrt(weight)[:, None]
    coefficients, _ = nnls(features / scale * root, seconds * root[:, 0])
    coefficients = coefficients / scale
    coefficients[0] = max(coefficients[0], 1e-6)
    return np.asarray(coefficients, float)


def _line(tokens: FloatArray, seconds: FloatArray, weight: FloatArray) -> tuple[float, float, FloatArray]:
    """Fit base + slope x tokens, neither negative; return both and the residuals."""
    if len(tokens) < _LEAST_REQUESTS // 2:
        raise FitError("too few requests whose first token did not wait for decode: prefill cannot be fitted")
    coefficients = _fit_nonnegative(np.stack([np.ones_like(tokens), tokens, np.zeros_like(tokens)], 1), seconds, weight)
    left = np.repeat(seconds - coefficients[0] - coefficients[1] * tokens, weight.astype(int))
    return float(coefficients[0]), float(coefficients[1]), left


def with_move_time(models: CostModels, others: Sequence[CostModels]) -> CostModels:
    """Return the models with the time of a move from other runs, where nothing moved in this one."""
    known = [one.move_s for one in others if one.move_s is not None]
    if models.move_s is not None or not known:
        return models
    return replace(models, move_s=float(np.mean(known)))
