"""KV blocks in closed form: how many an instance allocates in any number of steps, without a loop over the steps.

A request that attends to n tokens holds ceil(n / block size) blocks, and takes a new one at every step where
n - 1 is a multiple of the block size. Requests grow by one token a step, so each takes its blocks at the steps whose
index has one fixed remainder modulo the block size (its "phase"). A histogram of the phases of the batch gives the
blocks of any number of steps.
"""

import numpy as np

from ares.simulator.block_cache import leave_decode
from ares.simulator.heaps import compiled, inlined
from ares.simulator.state import NONE, State


@inlined
def blocks_for(state: State, tokens: int) -> int:
    """Return the blocks that `tokens` tokens need."""
    size = state.parameters.block_size
    return int((tokens + size - 1) // size)


@inlined
def unallocated_tokens(state: State, request: int) -> int:
    """Return the tokens of a request that is not in a slot, less those of the blocks that it holds already."""
    tokens = state.prompt[request] + state.generated[request]
    return int(tokens - state.blocks[request] * state.parameters.block_size)


@inlined
def phase_of(state: State, request: int, finish: int) -> int:
    """Return the phase of a decoding request: the steps at which it takes a new block, modulo the block size."""
    return int((1 - state.prompt[request] - state.output[request] + finish) % state.parameters.block_size)


@inlined
def tokens_at(state: State, request: int, finish: int, step: int) -> int:
    """Return the tokens that a decoding request attends to in a step."""
    return int(state.prompt[request] + state.output[request] - (finish - step))


@compiled
def blocks_taken(state: State, instance: int, steps: int) -> int:
    """Return the blocks allocated at the starts of the next `steps` steps, the one that runs now not counted."""
    size = state.parameters.block_size
    total = (steps // size) * state.batch[instance]
    step = state.step[instance]
    for ahead in range(1, steps % size + 1):
        total += state.phase[instance, (step + ahead) % size]
    return int(total)


@compiled
def steps_until_full(state: State, instance: int) -> int:
    """Return after how many steps the blocks run out: the step that then starts lacks at least one."""
    size = state.parameters.block_size
    batch = state.batch[instance]
    free = max(state.free[instance], 0)
    cycles = free // batch
    left = free - cycles * batch
    step = state.step[instance]
    for ahead in range(1, size + 1):
        left -= state.phase[instance, (step + ahead) % size]
        if left < 0:
            return int(cycles * size + ahead)
    return int((cycles + 1) * size)


@inlined
def enter_slot(state: State, instance: int, request: int, finish: int) -> None:
    """Add a request to the decoding batch of an instance; its blocks are allocated already."""
    at = state.batch[instance]
    state.slot_request[instance, at] = request
    state.slot_finish[instance, at] = finish
    state.slot[request] = at
    state.batch[instance] = at + 1
    state.resident[instance] += tokens_at(state, request, finish, state.step[instance])
    state.phase[instance, phase_of(state, request, finish)] += 1


@inlined
def record_token(state: State, request: int, moment: float) -> None:
    """Record that the stream of a request continues, and how long it was interrupted."""
    if not np.isnan(state.paused_since[request]):
        state.longest_gap[request] = max(state.longest_gap[request], moment - state.paused_since[request])
        state.paused_since[request] = np.nan


@compiled
def leave_slot(state: State, instance: int, at: int) -> int:
    """Remove the request in a slot from the batch at the start of a step, free its blocks, and return it."""
    request = state.slot_request[instance, at]
    finish = state.slot_finish[instance, at]
    step = state.step[instance]
    tokens = tokens_at(state, request, finish, step)
    last = state.batch[instance] - 1
    state.batch[instance] = last
    state.resident[instance] -= tokens
    state.phase[instance, phase_of(state, request, finish)] -= 1
    state.free[instance] += blocks_for(state, tokens - 1)
    leave_decode(state, request, instance)
    state.generated[request] = state.output[request] - (finish - step)
    state.slot[request] = NONE
    if np.isnan(state.paused_since[request]):
        state.paused_since[request] = state.time[instance]
    if at != last:
        moved = state.slot_request[instance, last]
        state.slot_request[instance, at] = moved
        state.slot_finish[instance, at] = state.slot_finish[instance, last]
        state.slot[moved] = at
    return int(request)
