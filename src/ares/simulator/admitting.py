"""Admission inside the event loop: who of the held and the suspended enters decode next, and where."""

import numpy as np
from numpy.typing import NDArray

from ares.policy import admission, queue
from ares.simulator.compiled import compiled, heap_pop, heap_push
from ares.simulator.decisions import enter, own_curve, place, refresh, rows_at
from ares.simulator.prediction import WEIGHTS, predict
from ares.simulator.prefill import to_prefill
from ares.simulator.state import (
    AGE_CREDIT,
    AGE_HEAD,
    AGE_SHARE,
    BASE_S,
    BLOCK_SIZE,
    FIRST_AT_PREFILL,
    HAS_PREDICTION,
    HEADROOM,
    HELD,
    HOLD,
    LEAST_SLACK_S,
    NOBODY,
    PER_REQUEST_S,
    PER_RESIDENT_S,
    PREFILL_RESUMES,
    QUEUE_SIZE,
    SAFETY,
    SLO_TTFT_S,
    STEP_BUDGET_S,
    SUSPEND_AFTER_S,
    SUSPENDED_COUNT,
    URGENT_STEPS,
    State,
)
from ares.simulator.suspension import is_urgent, make_room, next_to_resume, take_suspended

_STALE_S = 0.5  # telemetry of a live engine is no fresher
_LOST = 1e15  # added to the key of a request that has missed its first token: all others come first

admission_choice = compiled(admission.admission_choice)
tokens_within = compiled(admission.tokens_within)
memory_time = compiled(queue.memory_time)


@compiled
def hand_out(state: State, request: int, moment: float) -> None:
    """Dispatch a request that left prefill, or hold it for admission."""
    quantiles = np.empty(3)
    predict(state, request, state.generated[request], quantiles)
    if state.scalars[HAS_PREDICTION] > 0.0:
        key = memory_time(float(state.prompt[request] + state.generated[request]), quantiles[1])
        state.eviction_key[request] = key
        state.queue_key[request] = key
    if state.scalars[HOLD] == 0.0:
        place(state, request, moment)
        return
    hold(state, request)
    admit_held(state, moment)


@compiled
def hold(state: State, request: int) -> None:
    """Queue a request for admission by its key, and by its age."""
    state.status[request] = HELD
    size = state.counters[QUEUE_SIZE]
    state.counters[QUEUE_SIZE] = heap_push(state.queue_keys, state.queue_items, size, state.queue_key[request], request)
    state.by_age[state.age_tail[0] % len(state.by_age)] = request
    state.age_tail[0] += 1


@compiled
def refresh_and_admit(state: State, moment: float) -> None:
    """Forecast every instance anew and let in who fits."""
    if state.scalars[HOLD] > 0.0 and state.counters[QUEUE_SIZE] + state.counters[SUSPENDED_COUNT] > 0:
        for instance in range(len(state.time)):
            refresh(state, instance, moment)
        admit_held(state, moment)


@compiled
def admit_held(state: State, moment: float) -> None:
    """Let requests into decode until the next one fits nowhere.

    In this order: suspended ones that must run again; the oldest, when its share of the admitted memory-time has grown
    to its size; the waiting, smallest memory-time first; suspended ones that can wait; those that have missed their
    objectives already.
    """
    quantiles = np.empty(3)
    points = len(state.grid)
    mean, variance = np.zeros(points), np.zeros(points)
    capacity = _capacity(state)
    for instance in range(len(state.time)):
        if moment - state.forecast_time[instance] > _STALE_S:
            refresh(state, instance, moment)
    suspends = np.isfinite(state.scalars[SUSPEND_AFTER_S])
    while True:
        position, spare = next_to_resume(state, moment, quantiles) if suspends else (-1, 0.0)
        urgent = position >= 0 and is_urgent(state, spare)
        if urgent and _resume(state, position, True, capacity, mean, variance, moment):
            continue
        waiting = _first(state, moment, suspends)
        if waiting != NOBODY and _admit(state, waiting, capacity, mean, variance, moment, suspends):
            continue
        if waiting != NOBODY and state.queue_key[waiting] < _LOST:
            return
        if position >= 0 and _resume(state, position, False, capacity, mean, variance, moment):
            continue
        return


@compiled
def _capacity(state: State) -> NDArray[np.int64]:
    """Return the tokens that each instance can hold, and decode in the time that a step may take."""
    capacity = state.total_blocks * int(state.scalars[BLOCK_SIZE])
    for instance in range(len(capacity)):
        law = state.law[instance]
        budget, batch = state.scalars[STEP_BUDGET_S], rows_at(state, instance) + 1
        tokens = tokens_within(budget, law[BASE_S], law[PER_REQUEST_S], law[PER_RESIDENT_S], batch)
        if 0.0 < tokens < capacity[instance]:  # none at all: the objective is out of reach, and memory decides
            capacity[instance] = int(tokens)
    return capacity


@compiled
def _first(state: State, moment: float, suspends: bool) -> int:
    """Return the first of the held by key, or `NOBODY`; whoever has missed its first token goes behind the others."""
    while True:
        size = state.counters[QUEUE_SIZE]
        while size > 0 and state.status[state.queue_items[0]] != HELD:
            size = heap_pop(state.queue_keys, state.queue_items, size)
        state.counters[QUEUE_SIZE] = size
        if size == 0:
            return NOBODY
        request = state.queue_items[0]
        late = moment - state.arrival[request] > state.scalars[SLO_TTFT_S]
        if not suspends or not late or state.queue_key[request] >= _LOST:
            return int(request)
        size = heap_pop(state.queue_keys, state.queue_items, size)
        state.queue_key[request] += _LOST
        state.counters[QUEUE_SIZE] = heap_push(
            state.queue_keys, state.queue_items, size, state.queue_key[request], request
        )


@compiled
def _admit(
    state: State,
    request: int,
    capacity: NDArray[np.int64],
    mean: NDArray[np.float64],
    variance: NDArray[np.float64],
    moment: float,
    suspends: bool,
) -> bool:
    """Let the oldest in, if it is its turn, or `request`; return whether either fitted."""
    while state.status[state.by_age[state.counters[AGE_HEAD] % len(state.by_age)]] != HELD:
        state.counters[AGE_HEAD] += 1
    oldest = state.by_age[state.counters[AGE_HEAD] % len(state.by_age)]
    size = state.queue_key[oldest] % _LOST
    if state.scalars[AGE_CREDIT] >= size:
        chosen = _fit(state, oldest, False, capacity, mean, variance)
        if chosen >= 0:
            state.scalars[AGE_CREDIT] -= size
            _enter(state, oldest, chosen, mean, variance, moment)
            return True
        # It goes on waiting for room; whoever is small enough to fit does not wait with it.
    chosen = _fit(state, request, False, capacity, mean, variance)
    waited = moment - state.arrival[request]
    if chosen < 0 and suspends and state.scalars[SUSPEND_AFTER_S] <= waited <= state.scalars[SLO_TTFT_S]:
        chosen = make_room(state, mean.max(), state.queue_key[request], state.scalars[LEAST_SLACK_S], moment)
    if chosen < 0:
        return False
    state.scalars[AGE_CREDIT] += state.scalars[AGE_SHARE] * (state.queue_key[request] % _LOST)
    _enter(state, request, chosen, mean, variance, moment)
    return True


@compiled
def _enter(
    state: State,
    request: int,
    instance: int,
    mean: NDArray[np.float64],
    variance: NDArray[np.float64],
    moment: float,
) -> None:
    state.expected[instance] += mean
    state.variance[instance] += variance
    give_first(state, request, moment)
    enter(state, request, instance, moment)


@compiled
def give_first(state: State, request: int, moment: float) -> None:
    """Give the token of the prefill to the client, where that is how it is done and it has none yet."""
    if state.scalars[FIRST_AT_PREFILL] > 0.0 and np.isnan(state.first_token[request]):
        state.first_token[request] = moment


@compiled
def _resume(
    state: State,
    position: int,
    urgent: bool,
    capacity: NDArray[np.int64],
    mean: NDArray[np.float64],
    variance: NDArray[np.float64],
    moment: float,
) -> bool:
    """Let a suspended request run again where it fits; its tokens are prefilled anew first.

    On a prefill instance, where one is large enough: a decode instance would hold up its whole batch.
    """
    request = state.suspended_list[position]
    chosen = _fit(state, request, urgent, capacity, mean, variance)
    if chosen < 0:
        return False
    take_suspended(state, position)
    state.computed[request] = 0
    if state.scalars[PREFILL_RESUMES] == 0.0:
        _enter(state, request, chosen, mean, variance, moment)
        return True
    state.expected[chosen] += mean
    state.variance[chosen] += variance
    state.place[request] = chosen
    to_prefill(state, request, moment)
    return True


@compiled
def _fit(
    state: State,
    request: int,
    urgent: bool,
    capacity: NDArray[np.int64],
    mean: NDArray[np.float64],
    variance: NDArray[np.float64],
) -> int:
    """Return where a held request may enter, or -1; its own curve is left in `mean` and `variance`.

    An urgent one needs room for its next steps only: it has time to be suspended again, and none to wait.
    """
    quantiles = np.empty(3)
    predict(state, request, state.generated[request], quantiles)
    mean[:] = 0.0
    variance[:] = 0.0
    resident = float(state.prompt[request] + state.generated[request])
    own_curve(resident, quantiles, WEIGHTS, state.grid, mean, variance)
    points = len(state.grid)
    checked = 1
    horizon = min(quantiles[2], state.scalars[URGENT_STEPS]) if urgent else quantiles[2]
    while checked < points and state.grid[checked] < horizon:
        checked += 1
    deviations = 0.0 if urgent else state.scalars[SAFETY]
    return int(
        admission_choice(
            state.expected,
            state.variance,
            capacity,
            state.closed,
            mean,
            variance,
            checked,
            deviations,
            state.scalars[HEADROOM],
        )
    )
