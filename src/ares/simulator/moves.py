"""Migration: reserve at the target, copy while the source goes on, hand over, join; and how each is cancelled.

`write_rows` fills the rows from which the policy decides moves (telemetry.py).
"""

import numpy as np
from numpy.typing import NDArray

from ares.simulator.blocks import blocks_for, tokens_at
from ares.simulator.decisions import dispatch_again
from ares.simulator.heaps import compiled
from ares.simulator.instance import advance_to, release, replan, request_step
from ares.simulator.prediction import note_progress
from ares.simulator.queues import schedule_event, transfer_end
from ares.simulator.state import (
    COPY_DONE,
    DECODING,
    NONE,
    State,
)
from ares.simulator.step_time import steps_time


@compiled
def begin_move(state: State, request: int, target: int, moment: float) -> bool:
    """Reserve blocks at the target and start the copy; False where the target cannot promise the room (I6)."""
    source = state.decode_instance[request]
    busy = state.target[request] != NONE or state.moving[request] != 0
    if state.status[request] != DECODING or busy or source == target:
        return False
    occupied = state.batch[target] + state.prefilling[target] + state.inbound_count[target] + state.ready_count[target]
    advance_to(state, source, moment)
    advance_to(state, target, moment)
    tokens = tokens_at(state, request, state.slot_finish[source, state.slot[request]], state.step[source])
    end = transfer_end(state, state.egress_free[source], state.ingress_free[target], tokens, moment)
    step = max(steps_time(state, source, 1), 1e-4)
    growth = int((end + state.parameters.latency_s + state.parameters.stall_s - moment) / step) + 4
    need = blocks_for(state, tokens + growth)
    refused = need > state.free[target] - state.parameters.watermark_blocks
    if refused or state.closed[target] != 0 or occupied >= state.parameters.max_batch:
        state.current.migrations_refused += 1
        return False
    state.free[target] -= need
    replan(state, target)
    state.inbound_count[target] += 1
    state.reserved[request] = need
    state.promised[target] += need
    state.target[request] = target
    state.moving[request] = 1
    state.last_move[request] = moment
    state.egress_free[source] = end
    state.ingress_free[target] = end
    state.current.migrated_bytes += int(tokens * state.parameters.kv_bytes_per_token)
    schedule_event(state, end + state.parameters.latency_s, request, COPY_DONE)
    return True


@compiled
def finish_copy(state: State, request: int, moment: float) -> None:
    """Stop the request at the source's next step, or free the reservation where it is gone meanwhile (I5)."""
    if state.moving[request] == 1 and state.status[request] == DECODING:
        source = state.decode_instance[request]
        state.leaving_list[source, state.leaving_count[source]] = request
        state.leaving_count[source] += 1
        request_step(state, source, moment)
    else:
        release(state, request, moment)


@compiled
def finish_handover(state: State, request: int, moment: float) -> None:
    """Let the target own the request from its next step on."""
    target = state.target[request]
    state.decode_instance[request] = target
    state.target[request] = NONE
    blocks = state.reserved[request]
    state.reserved[request] = 0
    state.promised[target] -= blocks
    state.inbound_count[target] -= 1
    if state.closed[target] != 0:  # failed meanwhile: resume elsewhere from the tokens
        state.free[target] += blocks
        state.computed[request] = 0
        dispatch_again(state, request, moment)
        return
    state.blocks[request] = blocks
    state.ready_list[target, state.ready_count[target]] = request
    state.ready_count[target] += 1
    state.moved[request] += 1
    state.current.migrations += 1
    request_step(state, target, moment)


@compiled
def write_rows(
    state: State,
    moment: float,
    cooldown: float,
    requests: NDArray[np.int64],
    location: NDArray[np.int64],
    resident: NDArray[np.int64],
    remaining: NDArray[np.float64],
    movable: NDArray[np.bool_],
    oracle: bool,
) -> int:
    """Write one row for each request at a decode instance, as telemetry would; return the number of rows.

    First those that decode, then those on their way or waiting there, which cannot be moved. `remaining` has one column
    for each quantile, or the truth in all of them for the oracle.
    """
    rows = 0
    for instance in range(len(state.time)):
        advance_to(state, instance, moment)
        step = state.step[instance]
        for at in range(state.batch[instance]):
            request = state.slot_request[instance, at]
            left = state.slot_finish[instance, at] - step
            note_progress(state, request, state.output[request] - left)
            free = state.target[request] == NONE and state.moving[request] == 0
            movable[rows] = free and moment - state.last_move[request] >= cooldown
            rows = _row(state, request, instance, rows, requests, location, resident, remaining, oracle)
    for instance in range(len(state.time)):
        decoding = rows
        for index in range(state.prefilling[instance]):
            request = state.prefilling_list[instance, index]
            rows = _row(state, request, instance, rows, requests, location, resident, remaining, oracle)
        for index in range(state.ready_count[instance]):
            request = state.ready_list[instance, index]
            rows = _row(state, request, instance, rows, requests, location, resident, remaining, oracle)
        for index in range(state.arriving_count[instance]):
            request = state.arriving_list[instance, index]
            rows = _row(state, request, instance, rows, requests, location, resident, remaining, oracle)
        request = state.head[instance]
        while request != NONE:
            rows = _row(state, request, instance, rows, requests, location, resident, remaining, oracle)
            request = state.next_request[request]
        movable[decoding:rows] = False
    return rows


@compiled
def _row(
    state: State,
    request: int,
    instance: int,
    row: int,
    requests: NDArray[np.int64],
    location: NDArray[np.int64],
    resident: NDArray[np.int64],
    remaining: NDArray[np.float64],
    oracle: bool,
) -> int:
    requests[row] = request
    location[row] = instance
    if state.status[request] != DECODING:
        note_progress(state, request, state.generated[request])
    resident[row] = state.observed_tokens[request]
    if oracle:
        remaining[row, :] = state.output[request] - state.observed_generated[request]
    else:
        remaining[row] = state.observed_remaining[request]
    return row + 1
