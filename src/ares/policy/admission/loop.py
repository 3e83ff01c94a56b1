"""The inner loop of admission by forecast: which requests enter decode now, where, and which are suspended.

Plain loops over arrays (state.py), compiled where numba is installed. The gateway calls `admit` once for all waiting
requests (forecast.py), the simulator at every event that may have made room; neither has a rule of its own. Importing
this module imports numba.
"""

from typing import NamedTuple

import numpy as np

from ares.policy.admission import suspension
from ares.policy.admission.order import memory_time as _memory_time
from ares.policy.admission.settings import tokens_within as _tokens_within
from ares.policy.admission.state import (
    ADMIT,
    ADMITTED,
    DUE,
    F8,
    FITS,
    I8,
    OLDEST,
    RESUME,
    ROOM_MADE,
    RUNS_AGAIN,
    SUSPEND,
    SUSPENDED,
    WAITING,
    Horizon,
    Instances,
    LoopSettings,
    Queue,
    Requests,
)
from ares.policy.compiling import compiled, inlined
from ares.policy.forecast import own_curve as _own_curve

NONE = -1
# Which request is suspended for another, the last tier first: one that only misses its gap objective by it; one that is
# SLO-infeasible and misses its gap too; one with slack; one that is SLO-infeasible and has no gap to lose.
_LOSES_GAP, _INFEASIBLE_LOSES_GAP, _HAS_SLACK, _INFEASIBLE = range(4)
# In which order requests are considered, by why they would be admitted or resume.
_TURNS = (DUE, OLDEST, FITS, RUNS_AGAIN)

memory_time = compiled(_memory_time)
tokens_within = compiled(_tokens_within)
own_curve = compiled(_own_curve)
final_slack_s = compiled(suspension.final_slack_s)


class Context(NamedTuple):
    """The arguments of one call of `admit`, and what its functions share.

    Attributes
    ----------
    step_s
        Seconds of a step with full memory, or what a step may take where that is less.
    limit
        Tokens that each instance can hold, and decode in the time that a step may take, shape (I,).
    mean, variance
        Forecast of the request under consideration, shape (K,).
    """

    now: float
    instances: Instances
    requests: Requests
    horizon: Horizon
    settings: LoopSettings
    decided: I8
    numbers: F8
    step_s: float
    limit: I8
    mean: F8
    variance: F8


@inlined
def admit(
    now: float,
    credit: float,
    instances: Instances,
    requests: Requests,
    queue: Queue,
    horizon: Horizon,
    settings: LoopSettings,
    decided: I8,
    numbers: F8,
) -> tuple[int, float]:
    """Admit requests to decode until the next one fits nowhere.

    In this order: suspended ones that must resume now; the oldest, once its share of the admitted memory-time has grown
    to its size; the waiting, in their order; suspended ones that can wait.

    Parameters
    ----------
    now
        Seconds, on the clock of `requests`.
    credit
        Memory-time that the oldest may claim.
    decided, numbers
        Results, shape (D, 4): kind, request, instance, why; and (D, 3): tokens, peak of the forecast, limit. For a
        suspension the second number is the slack in seconds (NaN: SLO-infeasible; -inf: it misses its gap objective
        by it).

    Returns
    -------
    How many decisions were written (call again where fewer than two places are left), and the new credit.
    """
    limit, step_s = _limits(requests, queue, instances, settings)
    points = len(horizon.steps)
    context = Context(
        now, instances, requests, horizon, settings, decided, numbers, step_s, limit, np.zeros(points), np.zeros(points)
    )
    count, place, age = 0, 0, 0
    while count + 2 <= len(decided):
        due, slack = _next_to_resume(context, queue)
        must = settings.suspends > 0.0 and slack < settings.urgent_s
        place, age = _first_waiting(requests, queue.order, place), _first_waiting(requests, queue.by_age, age)
        made, passed_over = 0, False
        for why in _TURNS:  # one call of `_try_admit` for all: each would be compiled on its own
            request = _whose_turn(why, due, must, queue, place, age)
            if request == NONE or (why == OLDEST and not credit >= _size(requests, request)):
                continue
            made = _try_admit(context, request, why, count)
            if made > 0:
                credit += _credit(requests, settings, request, why)
                break
            # Where the oldest does not fit, it keeps waiting; a request that is small enough does not wait for it.
            if why == FITS:
                # The next one may go where this one may not.
                passed_over = len(requests.excluded) > 0 and bool(requests.excluded[request].any())
                if passed_over or not _ttft_missed(context, request):
                    break
        if made == 0 and not passed_over:
            break
        count += made
        place += int(passed_over)
    return count, credit


@inlined
def _whose_turn(why: int, due: int, must: bool, queue: Queue, place: int, age: int) -> int:
    """Return the request that is to be admitted or resumed for this reason, if it fits; or NONE."""
    if why == DUE:
        return due if must else NONE
    if why == RUNS_AGAIN:
        return due
    if place == len(queue.order):
        return NONE
    return int(queue.by_age[age] if why == OLDEST else queue.order[place])


@inlined
def _credit(requests: Requests, settings: LoopSettings, request: int, why: int) -> float:
    """Return the memory-time that the oldest may claim more once a request has been admitted."""
    size = _size(requests, request)
    if why == OLDEST:
        return -size
    return settings.age_share * size if why == FITS and np.isfinite(size) else 0.0


@inlined
def _first_waiting(requests: Requests, ids: I8, place: int) -> int:
    """Return the first index from `place` on whose request still waits."""
    while place < len(ids) and requests.status[ids[place]] != WAITING:
        place += 1
    return place


@inlined
def _ttft_missed(context: Context, request: int) -> bool:
    """Whether a waiting request has missed its TTFT; always false where nothing is suspended."""
    waited = context.now - context.requests.waiting_since_s[request]
    return context.settings.suspends > 0.0 and waited > context.requests.ttft_s[request]


@compiled
def insert_in_order(order: I8, length: int, request: int, rank: I8, ttft_missed: I8, key: F8) -> None:
    """Insert a request into the first `length` entries of `order`; there must be room for one more.

    Sorted by rank, then whether TTFT is missed, then key (memory-time, or arrival), then index.
    """
    low, high = 0, length
    while low < high:
        middle = (low + high) // 2
        if _goes_before(request, order[middle], rank, ttft_missed, key):
            high = middle
        else:
            low = middle + 1
    for place in range(length, low, -1):
        order[place] = order[place - 1]
    order[low] = request


@inlined
def _goes_before(first: int, second: int, rank: I8, ttft_missed: I8, key: F8) -> bool:
    if rank[first] != rank[second]:
        return bool(rank[first] < rank[second])
    if ttft_missed[first] != ttft_missed[second]:
        return bool(ttft_missed[first] < ttft_missed[second])
    if key[first] != key[second]:
        return bool(key[first] < key[second])
    return first < second


@compiled
def best_peak(expected: F8, memory: I8, closed: I8, lead: F8, mean: F8) -> int:
    """Return the open instance whose expected peak, with `mean` added, leaves the largest share free; or NONE.

    All have the shapes that `choose_instance` gives.
    """
    best, best_share = NONE, np.inf
    for instance in range(len(memory)):
        if closed[instance] != 0:
            continue
        share = ((expected[instance] + mean).max() - lead[instance]) / max(memory[instance], 1)
        if share < best_share:
            best, best_share = instance, share
    return best


@inlined
def _limits(requests: Requests, queue: Queue, instances: Instances, settings: LoopSettings) -> tuple[I8, float]:
    """Return how many tokens each instance can hold and decode within the longest allowed step, shape (I,).

    And the seconds of a step with full memory, or the longest allowed step where that is shorter.
    """
    limit = instances.memory.copy()
    if not settings.suspends > 0.0:
        return limit, np.inf
    budget = np.inf
    for request in queue.order:
        budget = min(budget, requests.tpot_s[request])
    for request in queue.suspended:
        budget = min(budget, requests.tpot_s[request])
    budget *= 1.0 - settings.tpot_margin
    full = 0.0
    for instance in range(len(limit)):
        base, token = instances.step_base_s[instance], instances.step_token_s[instance]
        full += base + token * instances.memory[instance]
        batch = instances.load[instance] + 1
        tokens = tokens_within(budget, base, instances.step_request_s[instance], token, batch)
        if 0.0 < tokens < limit[instance]:  # zero: the objective is out of reach, and memory decides
            limit[instance] = int(tokens)
    return limit, min(full / len(limit), budget)


@inlined
def _size(requests: Requests, request: int) -> float:
    """Return the predicted memory-time of a request."""
    remaining = requests.remaining[request]
    return float(memory_time(float(requests.tokens[request]), remaining[len(remaining) // 2]))


@inlined
def _curve(context: Context, request: int, mean: F8, variance: F8) -> None:
    """Write a request's own forecast."""
    horizon, requests = context.horizon, context.requests
    mean[:] = 0.0
    variance[:] = 0.0
    tokens, block = float(requests.tokens[request]), horizon.block_tokens
    own_curve(tokens, requests.remaining[request], horizon.weights, horizon.steps, block, mean, variance)


@inlined
def _try_admit(context: Context, request: int, why: int, count: int) -> int:
    """Admit a request where it fits, or suspend another for it if it waits; return the number of decisions.

    It fits where a high quantile of memory, the request included, stays below the limit less a headroom for as long as
    the request is likely to run; of several instances, where the predicted peak leaves the largest share free. One that
    must resume now needs room for its next steps only: it can be suspended again, but cannot wait.
    """
    instances, requests, settings, steps = context.instances, context.requests, context.settings, context.horizon.steps
    _curve(context, request, context.mean, context.variance)
    until = requests.remaining[request, requests.remaining.shape[1] - 1]
    deviations = settings.deviations
    if why == DUE:
        until, deviations = min(until, settings.urgent_steps), 0.0
    points = 1
    while points < len(steps) and not steps[points] >= until:
        points += 1
    closed = instances.closed
    if len(requests.excluded) > 0:
        closed = closed | requests.excluded[request]
    cached = requests.tokens[:0]
    if len(requests.cached) > 0:
        cached = requests.cached[request]
    cached_weight = settings.cached_weight
    if requests.status[request] == SUSPENDED:
        # What is not cached where it resumes is computed again, and not pulled from a prefill instance.
        cached_weight = max(cached_weight, 1.0)
    instance = choose_instance(
        instances.expected,
        instances.variance,
        context.limit,
        closed,
        cached,
        cached_weight,
        context.mean,
        context.variance,
        points,
        deviations,
        settings.headroom,
    )
    made = 1
    if instance == NONE and why == FITS and _may_make_room(context, request):
        instance = _make_room(context, request, context.mean.max(), count)
        _curve(context, request, context.mean, context.variance)
        why, made = ROOM_MADE, 2
    if instance == NONE:
        return 0
    for point in range(len(context.mean)):
        instances.expected[instance, point] += context.mean[point]
        instances.variance[instance, point] += context.variance[point]
    requests.status[request] = ADMITTED
    place = count + made - 1
    kind = RESUME if why in (DUE, RUNS_AGAIN) else ADMIT
    _write(context, place, kind, request, instance, why)
    context.numbers[place, 1] = instances.expected[instance].max()
    context.numbers[place, 2] = context.limit[instance]
    return made


@inlined
def _may_make_room(context: Context, request: int) -> bool:
    """Whether a waiting request has waited for long enough that another one is suspended for it."""
    waited = context.now - context.requests.waiting_since_s[request]
    suspends = context.settings.suspends > 0.0
    return suspends and not waited > context.requests.ttft_s[request] and not waited < context.settings.after_s


@inlined
def _write(context: Context, count: int, kind: int, request: int, instance: int, why: int) -> None:
    decided = context.decided
    decided[count, 0], decided[count, 1], decided[count, 2], decided[count, 3] = kind, request, instance, why
    context.numbers[count, 0] = context.requests.tokens[request]


@compiled
def choose_instance(
    expected: F8,
    variance: F8,
    limit: I8,
    closed: I8,
    cached: I8,
    cached_weight: float,
    own_mean: F8,
    own_variance: F8,
    points: int,
    deviations: float,
    headroom: float,
) -> int:
    """Choose the instance that a request may enter; NONE where its predicted peak fits nowhere.

    Parameters
    ----------
    expected, variance
        Forecast of every instance over the horizon, shape (I, K), tokens and tokens squared.
    limit, closed
        Tokens that each can hold, and 1 for instances that take no requests, shape (I,).
    cached
        Tokens of the request that each has cached, shape (I,), or (0,): none.
    cached_weight
        How many tokens fuller than another an instance may be for each of these: the bound against a herd, since what
        enters fills the instance, and has no more cached than it has tokens.
    own_mean, own_variance
        The request's own forecast, shape (K,).
    points
        How many points of the horizon to check.
    deviations
        How many standard deviations above the expectation count as safe.
    headroom
        Share of the limit that stays free.
    """
    best, best_share, tight = NONE, 1.0 - headroom, 0
    weighs = cached_weight > 0.0 and len(cached) > 0 and cached.max() > 0
    for instance in range(len(limit)):
        if closed[instance] != 0:
            continue
        empty = expected[instance, 0] <= 0.0
        if empty and not weighs:
            return instance  # an empty instance takes any request: waiting could not make more room
        lead = cached_weight * cached[instance] if weighs else 0.0
        most = best_share * limit[instance] + lead
        if empty and best == NONE:
            most = np.inf
        elif not empty:
            most = min(most, (1.0 - headroom) * limit[instance])
        # Most instances are full, and at about the same point: it is checked first.
        spread = np.sqrt(max(variance[instance, tight] + own_variance[tight], 0.0))
        if expected[instance, tight] + own_mean[tight] + deviations * spread > most:
            continue
        peak = 0.0
        for point in range(points):
            spread = np.sqrt(max(variance[instance, point] + own_variance[point], 0.0))
            peak = max(peak, expected[instance, point] + own_mean[point] + deviations * spread)
            if peak > most:
                tight = point
                break
        if peak <= most:
            best, best_share = instance, (peak - lead) / max(limit[instance], 1)
    return best


@inlined
def _slack_s(context: Context, request: int) -> tuple[bool, float]:
    """Return whether a request is SLO-infeasible, and for how many seconds it may be suspended.

    The gap objective bounds them, whatever else it misses; a request that has missed its gap has no bound.
    """
    requests, now = context.requests, context.now
    first, remaining = requests.first_token_s[request], requests.remaining[request]
    began = np.fmin(first, now)  # NaN: it has no first token
    elapsed, tpot = now - began, requests.tpot_s[request]
    generated = float(requests.generated[request])
    most = final_slack_s(tpot, generated, elapsed, remaining[len(remaining) - 1], context.step_s)
    slack = final_slack_s(tpot, generated, elapsed, remaining[0], context.step_s)
    infeasible = began - requests.arrived_s[request] > requests.ttft_s[request] or most < 0.0
    gap = requests.gap_s[request]
    if _misses_gap(context, request):
        return True, np.inf
    if requests.status[request] == SUSPENDED:
        gap -= now - requests.waiting_since_s[request]
    return infeasible, gap if infeasible else min(slack, gap)


@inlined
def _misses_gap(context: Context, request: int) -> bool:
    """Whether the longest gap in the stream of a request has missed its objective, or is about to.

    A suspension takes at least `least_gap_s`, so a suspended request with a shorter objective has missed it.
    """
    requests = context.requests
    longest = requests.longest_gap_s[request]
    if requests.status[request] == SUSPENDED:
        longest = max(longest, context.now - requests.waiting_since_s[request], context.settings.least_gap_s)
    return bool(longest > requests.gap_s[request])


@inlined
def _next_to_resume(context: Context, queue: Queue) -> tuple[int, float]:
    """Return the suspended request with the least slack, and that slack in seconds; NONE where there is none.

    SLO-infeasible ones come last, the oldest first, and only their longest gap makes them urgent. One that has been
    suspended for too long has no slack.
    """
    requests, settings = context.requests, context.settings
    best, best_infeasible, best_key, best_slack = NONE, True, np.inf, np.inf
    for request in queue.suspended:
        if requests.status[request] != SUSPENDED:
            continue
        infeasible, slack = False, np.inf
        if settings.suspends > 0.0:
            infeasible, slack = _slack_s(context, request)
            longest = settings.longest_missed_s if _misses_gap(context, request) else settings.longest_s
            if context.now - requests.waiting_since_s[request] > longest:
                infeasible, slack = False, 0.0
            infeasible = infeasible and not slack < settings.urgent_s
        key = requests.waiting_since_s[request] if infeasible else slack
        sooner = (infeasible, key) < (best_infeasible, best_key)
        if best == NONE or sooner or ((infeasible, key) == (best_infeasible, best_key) and request < best):
            best, best_infeasible, best_key, best_slack = request, infeasible, key, slack
    return best, best_slack


@inlined
def _make_room(context: Context, candidate: int, need: float, count: int) -> int:
    """Suspend the running request that loses least by it for a candidate; return its instance, or NONE.

    The largest of the SLO-infeasible ones that have missed their gap or have no objective for it; else the one with the
    most slack; else, where gaps have objectives, the largest: it misses its own, and is the first to be suspended from
    then on.

    Parameters
    ----------
    need
        KV tokens that the candidate holds at its peak.
    """
    instances, requests, settings = context.instances, context.requests, context.settings
    smallest = settings.ratio * _size(requests, candidate)
    best, best_instance, best_key, best_slack = NONE, NONE, (-1, 0, -np.inf), 0.0
    for instance in range(len(instances.memory)):
        excluded = len(requests.excluded) > 0 and requests.excluded[candidate, instance] != 0
        if excluded or instances.closed[instance] != 0:
            continue
        free = instances.memory[instance] - instances.expected[instance, 0]
        for row in range(instances.row_count[instance]):
            request = instances.row_request[instance, row]
            size = _size(requests, request)
            if requests.movable[request] == 0 or free + requests.tokens[request] < need or not size >= smallest:
                continue
            infeasible, slack = _slack_s(context, request)
            tier = _INFEASIBLE if infeasible else _HAS_SLACK
            if not slack >= settings.least_slack_s or (
                requests.gap_s[request] < settings.least_gap_s and slack < np.inf
            ):
                # It misses its gap, as the candidate would miss its TTFT: the largest, so that few do.
                if not np.isfinite(requests.gap_s[request]) or requests.rank[request] < requests.rank[candidate]:
                    continue
                tier = _INFEASIBLE_LOSES_GAP if infeasible else _LOSES_GAP
            key = (tier, requests.rank[request] if tier < _HAS_SLACK else 0, slack if tier == _HAS_SLACK else size)
            if key > best_key:
                best, best_instance, best_key = request, instance, key
                best_slack = np.nan if infeasible else -np.inf if tier == _LOSES_GAP else slack
    if best == NONE:
        return NONE
    requests.movable[best] = 0
    _write(context, count, SUSPEND, best, best_instance, candidate)
    context.numbers[count, 1] = best_slack
    _curve(context, best, context.mean, context.variance)
    for point in range(len(context.mean)):
        expected, variance = instances.expected[best_instance, point], instances.variance[best_instance, point]
        instances.expected[best_instance, point] = max(expected - context.mean[point], 0.0)
        instances.variance[best_instance, point] = max(variance - context.variance[point], 0.0)
    return int(best_instance)


def prepare() -> None:
    """Compile what the first decision would otherwise wait for: some ten seconds, or load it from the cache."""
    none, empty, matrix, ids = np.zeros(0), np.zeros(0, np.int64), np.zeros((0, 1)), np.zeros((0, 1), np.int64)
    instances = Instances(matrix, matrix, empty, empty, empty, none, none, none, ids, empty)
    times = (none, none, none, none, none, none, none)
    requests = Requests(
        empty, matrix, empty, *times, empty, empty, empty, np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int64)
    )
    horizon = Horizon(np.zeros(1), np.ones(1), 1)
    settings = LoopSettings(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    decided, numbers = np.zeros((2, 4), np.int64), np.zeros((2, 3))
    admit(0.0, 0.0, instances, requests, Queue(empty, empty, empty), horizon, settings, decided, numbers)
    insert_in_order(np.zeros(1, np.int64), 0, 0, np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1))
    best_peak(np.zeros((1, 1)), np.ones(1, np.int64), np.zeros(1, np.int64), np.zeros(1), np.zeros(1))
    choose_instance(matrix, matrix, empty, empty, empty, 0.0, none, none, 0, 0.0, 0.0)
    own_curve(0.0, np.zeros(1), np.ones(1), np.zeros(1), 1, np.zeros(1), np.zeros(1))
