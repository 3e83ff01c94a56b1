"""Dispatch and the forecast of each instance inside the event loop.

What is decided is decided by the functions of `ares.policy`; this file makes their arguments.
"""

import numpy as np
from numpy.typing import NDArray

from ares.policy import kernels
from ares.policy.admission import loop
from ares.policy.admission.forecast import GRID
from ares.policy.admission.state import WAITING
from ares.policy.dispatch.base import CALL_CHOOSE, ROUND_ROBIN, SMALLEST_PEAK
from ares.policy.dispatch.least_loaded import least_loaded_choice as _least_loaded_choice
from ares.policy.dispatch.round_robin import round_robin_choice as _round_robin_choice
from ares.policy.forecast import intervals
from ares.policy.forecast import survival_variance_steps as _survival_variance_steps
from ares.simulator.blocks import blocks_taken
from ares.simulator.heaps import compiled, inlined
from ares.simulator.instance import schedule_step
from ares.simulator.prediction import WEIGHTS, record_progress
from ares.simulator.queues import push_back
from ares.simulator.state import (
    NONE,
    NOT_LEAVING,
    QUEUED,
    State,
)
from ares.simulator.step_time import steps_by

STALE_S = 0.5  # age from which a forecast is made again: telemetry of a live engine is no fresher
# First point of the grid at or past each whole step.
_INTERVALS = intervals(GRID.tobytes())

best_peak = loop.best_peak
own_curve = loop.own_curve
survival_variance_steps = compiled(_survival_variance_steps)
forecast_rows = kernels.forecast_rows
least_loaded_choice = compiled(_least_loaded_choice)
round_robin_choice = compiled(_round_robin_choice)


@inlined
def free_blocks(state: State, instance: int, moment: float) -> int:
    """Return the free blocks of an instance in the step that runs at `moment`."""
    free = state.free[instance]
    if state.planned[instance] > 1:
        free -= blocks_taken(state, instance, min(steps_by(state, instance, moment), state.planned[instance] - 1))
    return int(free)


@inlined
def used_tokens(state: State, instance: int, moment: float) -> int:
    """Return the KV tokens of an instance that are in use, reserved, or needed by requests in its waiting queue."""
    used = (state.total_blocks[instance] - free_blocks(state, instance, moment)) * state.parameters.block_size
    return int(used + state.unallocated_tokens[instance])


@compiled
def least_loaded(state: State, tokens: int, moment: float) -> int:
    """Return the policy's choice of the least loaded instance, without computing the load of every one.

    What an instance uses only grows between its events, so its use at its last event is a lower bound that costs a
    subtraction. An instance whose bound exceeds the true use of the one with the lowest bound cannot be chosen; only
    the true use of the others is computed.
    """
    size = state.parameters.block_size
    decode = len(state.time)
    load, capacity = np.empty(decode, np.int64), np.empty(decode, np.int64)
    for instance in range(decode):
        load[instance] = (state.total_blocks[instance] - state.free[instance]) * size + state.unallocated_tokens[
            instance
        ]
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
        shares[instance] = 1.0 - free_blocks(state, instance, moment) / state.total_blocks[instance]


@inlined
def dispatch(state: State, request: int, moment: float) -> None:
    """Dispatch at once to an instance's waiting queue, or wait for the policy to be called (python_policies.py)."""
    rule = state.parameters.dispatch_rule
    if rule == CALL_CHOOSE:
        state.status[request] = WAITING
        state.order[state.current.queue_size] = request
        state.current.queue_size += 1
        state.current.call_policy_at_s = moment
        return
    if rule == ROUND_ROBIN:
        chosen = round_robin_choice(state.current.round_robin_cursor, state.closed)
        state.current.round_robin_cursor = chosen + 1
    elif rule == SMALLEST_PEAK:
        chosen = _smallest_peak(state, request, moment)
    else:
        chosen = least_loaded(state, state.prompt[request] + state.generated[request], moment)
    enqueue(state, request, chosen, moment)


@inlined
def _smallest_peak(state: State, request: int, moment: float) -> int:
    """Return the instance whose predicted peak leaves the largest share free, and add the request to its forecast."""
    refresh_stale(state, moment)
    mean, variance = np.zeros(len(state.grid)), np.zeros(len(state.grid))
    size, tokens = state.parameters.block_size, float(state.prompt[request] + state.generated[request])
    own_curve(tokens, state.observed_remaining[request], WEIGHTS, state.grid, size, mean, variance)
    chosen = best_peak(state.expected, state.total_blocks * size, state.closed, np.zeros(len(state.time)), mean)
    for point in range(len(state.grid)):
        state.expected[chosen, point] += mean[point]
        state.variance[chosen, point] += variance[point]
    return int(chosen)


@compiled
def enqueue(state: State, request: int, instance: int, moment: float) -> None:
    """Put a request into the waiting queue of an instance."""
    state.decode_instance[request] = instance
    state.status[request] = QUEUED
    blocked = state.head[instance] != NONE  # by a request ahead of it in the queue
    push_back(state, instance, request)
    if not blocked or state.planned[instance] == 0:
        schedule_step(state, instance, moment)


@compiled
def dispatch_again(state: State, request: int, moment: float) -> None:
    """Dispatch a request that lost its instance to the least loaded of the others."""
    tokens = state.prompt[request] + state.generated[request]
    enqueue(state, request, least_loaded(state, tokens, moment), moment)


@inlined
def rows_at(state: State, instance: int) -> int:
    """Return how many requests run at an instance, wait in its queue, or have their KV pulled to it."""
    coming = state.prefilling[instance] + state.ready_count[instance] + state.arriving_count[instance]
    return int(state.batch[instance] + coming + state.waiting_count[instance])


@compiled
def refresh_stale(state: State, moment: float) -> None:
    """Forecast the instances again whose forecast is too old, or older than a change (-inf)."""
    for instance in range(len(state.time)):
        if moment - state.forecast_time[instance] > STALE_S:
            refresh(state, instance, moment)


@inlined
def refresh(state: State, instance: int, moment: float) -> None:
    """Forecast one instance again, with every request at it."""
    state.forecast_time[instance] = moment
    batch, rows = state.batch[instance], rows_at(state, instance)
    resident, remaining = np.empty(rows, np.int64), np.empty((rows, len(WEIGHTS)))
    done = max(min(steps_by(state, instance, moment), state.planned[instance] - 1), 0)
    step = state.step[instance] + done
    for at in range(batch):
        request = state.slot_request[instance, at]
        record_progress(state, request, state.output[request] - (state.slot_finish[instance, at] - step))
        free = state.leaving[request] == NOT_LEAVING and state.target[request] == NONE
        state.suspendable[request] = free and not np.isnan(state.first_token[request])
        state.row_request[instance, at] = request
        for quantile in range(len(WEIGHTS)):
            remaining[at, quantile] = state.observed_remaining[request, quantile]
        resident[at] = state.observed_tokens[request]
    state.row_count[instance] = batch
    row = batch
    for index in range(state.prefilling[instance]):
        row = _add_row(state, state.prefilling_list[instance, index], row, resident, remaining)
    for index in range(state.ready_count[instance]):
        row = _add_row(state, state.ready_list[instance, index], row, resident, remaining)
    for index in range(state.arriving_count[instance]):
        row = _add_row(state, state.arriving_list[instance, index], row, resident, remaining)
    request = state.head[instance]
    while request != NONE:
        row = _add_row(state, request, row, resident, remaining)
        request = state.next_request[request]
    changes = np.empty(len(WEIGHTS))
    survival_variance_steps(WEIGHTS, changes)
    own = slice(instance, instance + 1)
    promised = np.zeros(1, np.int64)  # to moves towards this instance
    promised[0] = state.promised[instance] * state.parameters.block_size
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
        state.parameters.block_size,
        plain,
        state.expected[own],
        state.variance[own],
        count,
    )


@compiled
def _add_row(state: State, request: int, row: int, resident: NDArray[np.int64], remaining: NDArray[np.float64]) -> int:
    record_progress(state, request, state.generated[request])
    for quantile in range(len(WEIGHTS)):
        remaining[row, quantile] = state.observed_remaining[request, quantile]
    resident[row] = state.observed_tokens[request]
    return row + 1
