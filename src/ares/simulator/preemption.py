"""Running out of blocks: which request is preempted, and what that frees."""

import numpy as np

from ares.simulator.block_cache import leave_decode
from ares.simulator.blocks import leave_slot, unallocated_tokens
from ares.simulator.heaps import compiled, inlined
from ares.simulator.queues import push_front
from ares.simulator.state import (
    NONE,
    NOT_LEAVING,
    QUEUED,
    State,
)


@compiled
def choose_victim(state: State, instance: int) -> int:
    """Return the index of the request to preempt: the newest, or the one with the largest preemption key.

    Indices below `batch` are slots, those from there on are places in `prefilling_list`; NONE where nothing runs.
    """
    batch = state.batch[instance]
    chosen = NONE
    best = -np.inf
    preempts_largest = state.parameters.preempts_largest
    for at in range(batch + state.prefilling[instance]):
        request = state.slot_request[instance, at] if at < batch else state.prefilling_list[instance, at - batch]
        key = state.preemption_key[request] if preempts_largest else float(state.sequence[request])
        if key > best:
            best = key
            chosen = at
    return chosen


@compiled
def preempt(state: State, instance: int, at: int) -> int:
    """Free the blocks of a request and put it at the front of the waiting queue; return it.

    `at` is an index as `choose_victim` returns it.
    """
    batch = state.batch[instance]
    if at < batch:
        request = leave_slot(state, instance, at)
    else:
        request = state.prefilling_list[instance, at - batch]
        for follower in range(at - batch + 1, state.prefilling[instance]):
            state.prefilling_list[instance, follower - 1] = state.prefilling_list[instance, follower]
        state.prefilling[instance] -= 1
        state.unallocated_tokens[instance] -= unallocated_tokens(state, request)
        state.free[instance] += state.blocks[request]
        leave_decode(state, request, instance)
    state.leaving[request] = NOT_LEAVING  # its KV is gone, and with it the use of a copy in flight
    state.blocks[request] = 0
    state.computed[request] = 0
    state.preempted[request] += 1
    state.current.preemptions += 1
    state.status[request] = QUEUED
    push_front(state, instance, request)
    return int(request)


@inlined
def allocate_step_blocks(state: State, instance: int) -> bool:
    """Allocate the blocks that decoding requests need in this step, preempting while too few are free.

    Return whether a request was preempted.
    """
    phase = state.step[instance] % state.parameters.block_size
    oom = False
    while state.phase[instance, phase] > state.free[instance]:
        chosen = choose_victim(state, instance)
        if chosen == NONE:
            break
        oom = True
        preempt(state, instance, chosen)
    if oom:
        state.current.oom_events += 1
    state.free[instance] -= state.phase[instance, phase]
    return oom
