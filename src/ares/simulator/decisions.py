"""The policy inside the event loop: placement, and admission of held requests.

The rules are the functions of `ares.policy`, compiled as they stand; this file only builds their arguments.
"""

import numpy as np
from numpy.typing import NDArray

from ares.policy import admission, dispatch, queue
from ares.policy.forecast import own_curve as plain_own_curve
from ares.simulator.blocks import taken
from ares.simulator.compiled import compiled, heap_pop, heap_push
from ares.simulator.instance import poke
from ares.simulator.law import steps_by
from ares.simulator.prediction import predict
from ares.simulator.queues import push_back
from ares.simulator.state import (
    AGE_CREDIT,
    AGE_HEAD,
    AGE_SHARE,
    BLOCK_SIZE,
    DISPATCH_RULE,
    FULL_STEP_S,
    HANDED_OUT,
    HAS_PREDICTION,
    HEADROOM,
    HELD,
    HOLD,
    HORIZON,
    HORIZON_STRICT,
    LAST_HANDOUT_S,
    LAX_BELOW,
    MEAN_GAP_S,
    MEAN_PREDICTED,
    MEAN_TRUE,
    MEAN_VOLUME,
    NOBODY,
    QUEUE_SIZE,
    ROBIN,
    ROOM_FOR_SHORT,
    SAFETY,
    SHORT,
    STRICT_ABOVE,
    WAITING,
    WINDOW,
    State,
)

_STALE_S = 0.5  # telemetry of a live engine is no fresher

own_curve = compiled(plain_own_curve)
admission_choice = compiled(admission.admission_choice)
least_loaded_choice = compiled(dispatch.least_loaded_choice)
round_robin_choice = compiled(dispatch.round_robin_choice)
memory_time = compiled(queue.memory_time)
offered_load = compiled(admission.offered_load)
strictness = compiled(admission.strictness)
checked_horizon = compiled(admission.checked_horizon)


@compiled
def used_tokens(state: State, instance: int, moment: float) -> int:
    """Return the KV tokens of an instance in use, reserved, or asked for by its own waiting requests."""
    free = state.free[instance]
    if state.planned[instance] > 1:
        free -= taken(state, instance, min(steps_by(state, instance, moment), state.planned[instance] - 1))
    used = (state.total_blocks[instance] - free) * int(state.scalars[BLOCK_SIZE])
    return int(used + state.waiting_tokens[instance])


@compiled
def least_loaded(state: State, tokens: int, moment: float) -> int:
    """Return the policy's choice of the least loaded instance, without counting the load of every one.

    What an instance uses only grows between its events, so its use at its last event is a lower bound that costs a
    subtraction. One that is worse by that bound than the best bound's instance truly is cannot be chosen, whatever it
    truly is; the others are counted.
    """
    size = int(state.scalars[BLOCK_SIZE])
    decode = len(state.time)
    load, capacity = np.empty(decode, np.int64), np.empty(decode, np.int64)
    for instance in range(decode):
        load[instance] = (state.total_blocks[instance] - state.free[instance]) * size + state.waiting_tokens[instance]
        capacity[instance] = state.total_blocks[instance] * size
    first = least_loaded_choice(load, capacity, state.closed, tokens)
    if first < 0:
        return first
    load[first] = used_tokens(state, first, moment)
    worst = (load[first] + tokens) / max(capacity[first], 1)
    for instance in range(decode):
        if instance != first and (load[instance] + tokens) / max(capacity[instance], 1) <= worst:
            load[instance] = used_tokens(state, instance, moment)
    return int(least_loaded_choice(load, capacity, state.closed, tokens))


@compiled
def kv_shares(state: State, moment: float, shares: NDArray[np.float64]) -> None:
    """Write the share of KV in use of every instance, shape (D,)."""
    for instance in range(len(shares)):
        free = state.free[instance]
        if state.planned[instance] > 1:
            free -= taken(state, instance, min(steps_by(state, instance, moment), state.planned[instance] - 1))
        shares[instance] = 1.0 - free / state.total_blocks[instance]


@compiled
def place(state: State, request: int, moment: float) -> None:
    """Dispatch at once: the request waits at its instance from now on."""
    if state.scalars[DISPATCH_RULE] == 0.0:
        chosen = round_robin_choice(state.counters[ROBIN], state.closed)
        state.counters[ROBIN] = chosen + 1
    else:
        chosen = least_loaded(state, state.prompt[request] + state.generated[request], moment)
    enter(state, request, chosen, moment)


@compiled
def enter(state: State, request: int, instance: int, moment: float) -> None:
    """Put a request into the waiting queue of an instance."""
    state.place[request] = instance
    state.status[request] = WAITING
    blocked = state.head[instance] != NOBODY  # whoever waits already will be asked first, and needs no second poke
    push_back(state, instance, request)
    if not blocked or state.planned[instance] == 0:
        poke(state, instance, moment)


@compiled
def reroute(state: State, request: int, moment: float) -> None:
    """Send a request that lost its instance to the least loaded of the others."""
    enter(state, request, least_loaded(state, state.prompt[request], moment), moment)


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
    note_arrival(state, state.queue_key[request], moment)
    hold(state, request)
    admit_held(state, moment)


@compiled
def note_arrival(state: State, volume: float, moment: float) -> None:
    """Average memory-time and time between requests: plainly at first, exponentially from a window's worth on."""
    seen = state.scalars[HANDED_OUT] + 1.0
    state.scalars[HANDED_OUT] = seen
    share = 1.0 / min(seen, state.scalars[WINDOW])
    state.scalars[MEAN_VOLUME] += share * (volume - state.scalars[MEAN_VOLUME])
    gap = moment - state.scalars[LAST_HANDOUT_S]
    state.scalars[MEAN_GAP_S] += share * (gap - state.scalars[MEAN_GAP_S])
    state.scalars[LAST_HANDOUT_S] = moment


@compiled
def hold(state: State, request: int) -> None:
    """Queue a request for admission by its key, and by its age."""
    state.status[request] = HELD
    size = state.counters[QUEUE_SIZE]
    state.counters[QUEUE_SIZE] = heap_push(state.queue_keys, state.queue_items, size, state.queue_key[request], request)
    state.by_age[state.age_tail[0] % len(state.by_age)] = request
    state.age_tail[0] += 1


@compiled
def refresh(state: State, instance: int, moment: float) -> None:
    """Forecast one instance anew: its running, inbound and waiting requests."""
    state.forecast_time[instance] = moment
    state.expected[instance, :] = 0.0
    state.variance[instance, :] = 0.0
    weights = np.array([0.3, 0.4, 0.3])
    quantiles = np.empty(3)
    done = max(min(steps_by(state, instance, moment), state.planned[instance] - 1), 0)
    step = state.step[instance] + done
    for at in range(state.batch[instance]):
        request = state.slot_request[instance, at]
        generated = state.output[request] - (state.slot_finish[instance, at] - step)
        predict(state, request, generated, quantiles)
        resident = float(state.prompt[request] + generated)
        own_curve(resident, quantiles, weights, state.grid, state.expected[instance], state.variance[instance])
    for index in range(state.prefilling[instance]):
        _add(state, instance, state.prefilling_list[instance, index], quantiles, weights)
    for index in range(state.ready_count[instance]):
        _add(state, instance, state.ready_list[instance, index], quantiles, weights)
    for index in range(state.arriving_count[instance]):
        _add(state, instance, state.arriving_list[instance, index], quantiles, weights)
    waiting = state.head[instance]
    while waiting != NOBODY:
        _add(state, instance, waiting, quantiles, weights)
        waiting = state.follow[waiting]


@compiled
def refresh_and_admit(state: State, moment: float) -> None:
    """Forecast every instance anew and let in who fits."""
    if state.scalars[HOLD] > 0.0 and state.counters[QUEUE_SIZE] > 0:
        for instance in range(len(state.time)):
            refresh(state, instance, moment)
        admit_held(state, moment)


@compiled
def _add(
    state: State, instance: int, request: int, quantiles: NDArray[np.float64], weights: NDArray[np.float64]
) -> None:
    generated = state.generated[request]
    predict(state, request, generated, quantiles)
    for atom in range(len(quantiles)):
        if np.isnan(quantiles[atom]):
            quantiles[atom] = np.inf
    resident = float(state.prompt[request] + generated)
    own_curve(resident, quantiles, weights, state.grid, state.expected[instance], state.variance[instance])


@compiled
def admit_held(state: State, moment: float) -> None:
    """Let held requests into decode, in order, until the next one fits nowhere."""
    weights = np.array([0.3, 0.4, 0.3])
    quantiles = np.empty(3)
    points = len(state.grid)
    capacity = state.total_blocks * int(state.scalars[BLOCK_SIZE])
    total = 0.0
    for instance in range(len(state.time)):
        total += (1 - state.closed[instance]) * capacity[instance]
        if moment - state.forecast_time[instance] > _STALE_S:
            refresh(state, instance, moment)
    true_volume = state.scalars[MEAN_TRUE]
    bias = state.scalars[MEAN_PREDICTED] / true_volume if true_volume > 0.0 else 1.0
    gap = state.scalars[MEAN_GAP_S]
    offered = offered_load(state.scalars[MEAN_VOLUME], bias, gap, total, state.scalars[FULL_STEP_S])
    strict = strictness(offered, state.scalars[LAX_BELOW], state.scalars[STRICT_ABOVE])
    while True:
        size = state.counters[QUEUE_SIZE]
        while size > 0 and state.status[state.queue_items[0]] != HELD:
            size = heap_pop(state.queue_keys, state.queue_items, size)
        state.counters[QUEUE_SIZE] = size
        if size == 0:
            return
        request = state.queue_items[0]
        # The lane of the oldest: its turn comes when its share of the admitted memory-time has grown to its size.
        while state.status[state.by_age[state.counters[AGE_HEAD] % len(state.by_age)]] != HELD:
            state.counters[AGE_HEAD] += 1
        oldest = state.by_age[state.counters[AGE_HEAD] % len(state.by_age)]
        aged = state.scalars[AGE_CREDIT] >= state.queue_key[oldest]
        if aged:
            request = oldest
        predict(state, request, state.generated[request], quantiles)
        mean, variance = np.zeros(points), np.zeros(points)
        resident = float(state.prompt[request] + state.generated[request])
        own_curve(resident, quantiles, weights, state.grid, mean, variance)
        checked = 1
        horizon = min(quantiles[2], checked_horizon(strict, state.scalars[HORIZON], state.scalars[HORIZON_STRICT]))
        while checked < points and state.grid[checked] < horizon:
            checked += 1
        left = quantiles[1]
        room = strict * state.scalars[ROOM_FOR_SHORT] * left / (left + state.scalars[SHORT])
        chosen = admission_choice(
            state.expected,
            state.variance,
            capacity,
            state.closed,
            mean,
            variance,
            checked,
            strict * state.scalars[SAFETY],
            state.scalars[HEADROOM] + room,
        )
        if chosen < 0:
            return
        if aged:
            state.scalars[AGE_CREDIT] -= state.queue_key[request]
        else:
            state.scalars[AGE_CREDIT] += state.scalars[AGE_SHARE] * state.queue_key[request]
        state.expected[chosen] += mean
        state.variance[chosen] += variance
        enter(state, request, chosen, moment)
