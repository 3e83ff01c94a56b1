"""The policy inside the event loop: placement, and the forecast of each instance.

The rules are the functions of `ares.policy`; this file only builds their arguments.
"""

import numpy as np
from numpy.typing import NDArray

from ares.policy import kernels
from ares.policy.admission import loop
from ares.policy.admission.forecast import GRID
from ares.policy.dispatch.base import ASK, ROUND_ROBIN, SMALLEST_PEAK
from ares.policy.dispatch.least_loaded import least_loaded_choice as _least_loaded_choice
from ares.policy.dispatch.round_robin import round_robin_choice as _round_robin_choice
from ares.policy.forecast import intervals
from ares.policy.forecast import survival_steps as plain_staircase
from ares.simulator.blocks import taken
from ares.simulator.heaps import compiled
from ares.simulator.instance import request_step
from ares.simulator.prediction import WEIGHTS, see
from ares.simulator.queues import push_back
from ares.simulator.state import (
    ASK_AT,
    BLOCK_SIZE,
    DISPATCH_RULE,
    HELD,
    NOBODY,
    QUEUE_SIZE,
    ROBIN,
    WAITING,
    State,
)
from ares.simulator.step_time import steps_by

STALE_S = 0.5  # telemetry of a live engine is no fresher
# First point of the grid at or past each whole step.
_INTERVALS = intervals(GRID.tobytes())

best_peak = loop.best_peak
own_curve = loop.own_curve
survival_steps = compiled(plain_staircase)
forecast_rows = kernels.forecast_rows
least_loaded_choice = compiled(_least_loaded_choice)
round_robin_choice = compiled(_round_robin_choice)


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
    """Dispatch at once: the request waits at its instance from now on, or for the policy to be asked (asking.py)."""
    rule = int(state.scalars[DISPATCH_RULE])
    if rule == ASK:
        state.status[request] = HELD
        state.order[state.counters[QUEUE_SIZE]] = request
        state.counters[QUEUE_SIZE] += 1
        state.scalars[ASK_AT] = moment
        return
    if rule == ROUND_ROBIN:
        chosen = round_robin_choice(state.counters[ROBIN], state.closed)
        state.counters[ROBIN] = chosen + 1
    elif rule == SMALLEST_PEAK:
        chosen = _by_forecast(state, request, moment)
    else:
        chosen = least_loaded(state, state.prompt[request] + state.generated[request], moment)
    enter(state, request, chosen, moment)


@compiled
def _by_forecast(state: State, request: int, moment: float) -> int:
    """Return where the predicted peak leaves the largest share free, and count the request there."""
    for instance in range(len(state.time)):
        if moment - state.forecast_time[instance] > STALE_S:
            refresh(state, instance, moment)
    mean, variance = np.zeros(len(state.grid)), np.zeros(len(state.grid))
    size, tokens = int(state.scalars[BLOCK_SIZE]), float(state.prompt[request] + state.generated[request])
    own_curve(tokens, state.seen_remaining[request], WEIGHTS, state.grid, size, mean, variance)
    chosen = best_peak(state.expected, state.total_blocks * size, state.closed, mean)
    state.expected[chosen] += mean
    state.variance[chosen] += variance
    return int(chosen)


@compiled
def enter(state: State, request: int, instance: int, moment: float) -> None:
    """Put a request into the waiting queue of an instance."""
    state.place[request] = instance
    state.status[request] = WAITING
    blocked = (
        state.head[instance] != NOBODY
    )  # whoever waits already will be asked first, and needs no second request_step
    push_back(state, instance, request)
    if not blocked or state.planned[instance] == 0:
        request_step(state, instance, moment)


@compiled
def reroute(state: State, request: int, moment: float) -> None:
    """Send a request that lost its instance to the least loaded of the others."""
    enter(state, request, least_loaded(state, state.prompt[request], moment), moment)


@compiled
def rows_at(state: State, instance: int) -> int:
    """Return how many requests run at an instance, come to it or wait there."""
    coming = state.prefilling[instance] + state.ready_count[instance] + state.arriving_count[instance]
    return int(state.batch[instance] + coming + state.waiting_count[instance])


@compiled
def refresh(state: State, instance: int, moment: float) -> None:
    """Forecast one instance anew: its running, inbound and waiting requests."""
    state.forecast_time[instance] = moment
    batch, rows = state.batch[instance], rows_at(state, instance)
    resident, remaining = np.empty(rows, np.int64), np.empty((rows, len(WEIGHTS)))
    done = max(min(steps_by(state, instance, moment), state.planned[instance] - 1), 0)
    step = state.step[instance] + done
    for at in range(batch):
        request = state.slot_request[instance, at]
        see(state, request, state.output[request] - (state.slot_finish[instance, at] - step))
        free = state.moving[request] == 0 and state.target[request] == NOBODY
        state.movable[request] = free and not np.isnan(state.first_token[request])
        state.row_request[instance, at] = request
        remaining[at] = state.seen_remaining[request]
        resident[at] = state.seen_tokens[request]
    state.row_count[instance] = batch
    row = batch
    for index in range(state.prefilling[instance]):
        row = _add(state, state.prefilling_list[instance, index], row, resident, remaining)
    for index in range(state.ready_count[instance]):
        row = _add(state, state.ready_list[instance, index], row, resident, remaining)
    for index in range(state.arriving_count[instance]):
        row = _add(state, state.arriving_list[instance, index], row, resident, remaining)
    request = state.head[instance]
    while request != NOBODY:
        row = _add(state, request, row, resident, remaining)
        request = state.follow[request]
    changes = np.empty(len(WEIGHTS))
    survival_steps(WEIGHTS, changes)
    here = slice(instance, instance + 1)
    promised = np.zeros(1, np.int64)  # to moves that are on their way here
    promised[0] = state.promised[instance] * int(state.scalars[BLOCK_SIZE])
    plain, count = np.empty((1, len(state.grid))), np.empty((1, len(state.grid)))
    forecast_rows(
        np.zeros(rows, np.int64),
        resident,
        remaining,
        promised,
        WEIGHTS,
        changes,
        _INTERVALS,
        state.grid,
        int(state.scalars[BLOCK_SIZE]),
        plain,
        state.expected[here],
        state.variance[here],
        count,
    )


@compiled
def _add(state: State, request: int, row: int, resident: NDArray[np.int64], remaining: NDArray[np.float64]) -> int:
    see(state, request, state.generated[request])
    remaining[row] = state.seen_remaining[request]
    resident[row] = state.seen_tokens[request]
    return row + 1
