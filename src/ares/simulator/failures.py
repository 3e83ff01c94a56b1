"""The loss of a decode instance: every request on it resumes elsewhere from its tokens (invariant I1)."""

import numpy as np

from ares.simulator.block_cache import evict, leave_decode
from ares.simulator.blocks import leave_slot, unallocated_tokens
from ares.simulator.decisions import dispatch_again
from ares.simulator.heaps import tree_set
from ares.simulator.instance import advance_to, release_reservation
from ares.simulator.queues import take_first
from ares.simulator.state import MIGRATING, NONE, NOT_LEAVING, State


def fail_instance(state: State, instance: int, moment: float) -> None:
    """Close an instance and send its requests to others, to be recomputed there.

    Requests whose KV is being transferred to it are dispatched again when the transfer ends (loop.py and moves.py).

    Raises
    ------
    ValueError
        Where no other instance is left.
    """
    if not any(not closed for index, closed in enumerate(state.closed) if index != instance):
        raise ValueError(f"failure of decode instance {instance}: no other instance is left")
    advance_to(state, instance, moment)
    state.closed[instance] = 1
    lost: list[int] = []
    while state.batch[instance] > 0:
        # A step that runs now has taken its block already: leave_slot counts to the start of the step.
        request = int(leave_slot(state, instance, 0))
        lost.append(request)
    for index in range(int(state.prefilling[instance])):
        request = int(state.prefilling_list[instance, index])
        state.unallocated_tokens[instance] -= unallocated_tokens(state, request)
        leave_decode(state, request, instance)
        lost.append(request)
    ready = [int(state.ready_list[instance, index]) for index in range(int(state.ready_count[instance]))]
    for request in ready:
        leave_decode(state, request, instance)
    leaving = [int(state.leaving_list[instance, index]) for index in range(int(state.leaving_count[instance]))]
    state.prefilling[instance] = state.ready_count[instance] = state.leaving_count[instance] = 0
    while state.head[instance] != NONE:
        lost.append(int(take_first(state, instance)))
    state.planned[instance] = 0
    tree_set(state.tree, instance, np.inf)
    for request in leaving:
        if state.target[request] != NONE:  # copied, but not handed over: no event will free the reservation
            release_reservation(state, request, moment)
    state.leaving[(state.target == instance) & (state.leaving == MIGRATING)] = NOT_LEAVING
    # The blocks still allocated here belong to transfers towards it, which free them when they end.
    inbound = [int(state.arriving_list[instance, index]) for index in range(int(state.arriving_count[instance]))]
    promised = int(state.blocks[inbound].sum()) + int(state.reserved[state.target == instance].sum())
    for request in inbound:
        leave_decode(state, request, instance)
    state.free[instance] = state.total_blocks[instance] - promised
    if state.parameters.cached_block_tokens > 0:
        evict(state, instance, 0)
    for request in sorted({*lost, *ready}):
        state.leaving[request] = NOT_LEAVING
        state.blocks[request] = 0
        state.computed[request] = 0
        dispatch_again(state, request, moment)
