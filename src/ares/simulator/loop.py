"""The event loop: arrivals, ends of prefills and of transfers, and starts of decode steps, in order of time."""

import numpy as np

from ares.simulator.admission import admit_after_step, admit_waiting, deliver_first_token, dispatch_or_wait
from ares.simulator.block_cache import leave_decode, leave_prefill
from ares.simulator.decisions import dispatch_again, enqueue
from ares.simulator.heaps import compiled, heap_pop, inlined, tree_first, tree_set
from ares.simulator.instance import schedule_step, start_step
from ares.simulator.moves import finish_copy, finish_handover
from ares.simulator.prefill import pinned_tokens, queue_for_prefill, start_prefill
from ares.simulator.state import (
    COPY_DONE,
    IMMEDIATE,
    KINDS,
    NONE,
    PULL_DONE,
    State,
)


@inlined
def arrive(state: State, request: int, moment: float) -> None:
    """Send a new request to prefill, or to decode where there is no prefill instance."""
    if len(state.prefill_backlog) == 0:
        dispatch_or_wait(state, request, moment)
    else:
        queue_for_prefill(state, request, moment)


@inlined
def finish_prefill(state: State, prefill: int, moment: float) -> None:
    """Dispatch a prefilled request, or let it wait for admission; its KV stays pinned until it has been pulled."""
    request = state.prefill_current[prefill]
    state.prefill_current[prefill] = NONE
    state.prefill_backlog[prefill] -= state.prefill_work[request]
    tree_set(state.tree, len(state.time) + prefill, np.inf)
    if state.parameters.admission_mode == IMMEDIATE or state.decode_instance[request] != NONE:
        deliver_first_token(state, request, moment)
    if state.decode_instance[request] == NONE:
        dispatch_or_wait(state, request, moment)
    elif state.closed[state.decode_instance[request]] != 0:
        dispatch_again(state, request, moment)
    else:
        enqueue(state, request, state.decode_instance[request], moment)
    start_prefill(state, prefill, moment)


@inlined
def finish_pull(state: State, request: int, moment: float) -> None:
    """Let a request whose KV has arrived join the next step; its prefill instance frees the KV."""
    instance, prefill = state.decode_instance[request], state.prefill_instance[request]
    state.inbound_count[instance] -= 1
    for index in range(state.arriving_count[instance]):
        if state.arriving_list[instance, index] == request:
            state.arriving_count[instance] -= 1
            state.arriving_list[instance, index] = state.arriving_list[instance, state.arriving_count[instance]]
            break
    if state.closed[instance] != 0:  # failed meanwhile; prefill still holds the KV for another pull
        state.free[instance] += state.blocks[request]
        leave_decode(state, request, instance)
        state.blocks[request] = 0
        dispatch_again(state, request, moment)
        return
    state.prefill_instance[request] = NONE
    leave_prefill(state, request, prefill)
    state.prefill_free[prefill] += pinned_tokens(state, request)
    state.ready_list[instance, state.ready_count[instance]] = request
    state.ready_count[instance] += 1
    schedule_step(state, instance, moment)
    start_prefill(state, prefill, moment)


@compiled
def handle_events(state: State, moment: float) -> bool:
    """Handle every event up to `moment`, or up to when a policy is to be called; return whether any event is left."""
    requests = len(state.arrival)
    decode = len(state.time)
    while True:
        following = state.current.next_arrival
        arrival = state.arrival[following] if following < requests else np.inf
        transfer = state.heap_keys[0] if state.current.heap_size > 0 else np.inf
        now = min(arrival, transfer, state.tree[1])
        if now > state.current.call_policy_at_s and state.current.call_policy_at_s <= moment:
            state.current.now_s = state.current.call_policy_at_s
            return True
        if now > moment or now == np.inf:
            state.current.now_s = moment
            return bool(now != np.inf)
        state.current.events += 1
        if arrival == now:
            state.current.next_arrival += 1
            arrive(state, following, now)
        elif transfer == now:
            item = state.heap_items[0]
            size = state.current.heap_size
            state.current.heap_size = heap_pop(state.heap_keys, state.heap_items, size)
            request, kind = item // KINDS, item % KINDS
            if kind == PULL_DONE:
                finish_pull(state, request, now)
            elif kind == COPY_DONE:
                finish_copy(state, request, now)
            else:
                finish_handover(state, request, now)
        else:
            leaf = tree_first(state.tree)
            if leaf >= decode:
                finish_prefill(state, leaf - decode, now)
            else:
                start_step(state, leaf, now)
                if state.parameters.admission_mode != IMMEDIATE:
                    admit_after_step(state, leaf, now)
        if state.current.admission_due != 0:
            state.current.admission_due = 0
            admit_waiting(state, now)
