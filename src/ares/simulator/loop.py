"""The event loop: arrivals, prefill, transfers and the next decision of every instance, in order of time."""

import numpy as np

from ares.simulator.admission import give_first, hand_out, look_again
from ares.simulator.decisions import enter, reroute
from ares.simulator.heaps import compiled, heap_pop, tree_first, tree_set
from ares.simulator.instance import request_step, wake
from ares.simulator.moves import copy_done, handover_done
from ares.simulator.prefill import pinned_tokens, start_prefill, to_prefill
from ares.simulator.state import (
    ASK_AT,
    AT_ONCE,
    COPY_DONE,
    EVENTS,
    HEAP_SIZE,
    HOLD,
    KINDS,
    NEXT_ARRIVAL,
    NOBODY,
    NOW,
    PULL_DONE,
    State,
)


@compiled
def arrive(state: State, request: int, moment: float) -> None:
    """Send a new request to prefill, or straight to decode without any."""
    if len(state.prefill_backlog) == 0:
        hand_out(state, request, moment)
    else:
        to_prefill(state, request, moment)


@compiled
def finish_prefill(state: State, prefill: int, moment: float) -> None:
    """Hand a prefilled request out; its KV stays pinned until it has been pulled."""
    request = state.prefill_current[prefill]
    state.prefill_current[prefill] = NOBODY
    state.prefill_backlog[prefill] -= state.prompt[request] + state.generated[request]
    tree_set(state.tree, len(state.time) + prefill, np.inf)
    if state.scalars[HOLD] == AT_ONCE or state.place[request] != NOBODY:
        give_first(state, request, moment)
    if state.place[request] == NOBODY:
        hand_out(state, request, moment)
    elif state.closed[state.place[request]] != 0:
        reroute(state, request, moment)
    else:
        enter(state, request, state.place[request], moment)
    start_prefill(state, prefill, moment)


@compiled
def pull_done(state: State, request: int, moment: float) -> None:
    """Let a request whose KV has arrived join the next step; prefill unpins its copy."""
    instance, prefill = state.place[request], state.prefill_place[request]
    state.inbound_count[instance] -= 1
    for index in range(state.arriving_count[instance]):
        if state.arriving_list[instance, index] == request:
            state.arriving_count[instance] -= 1
            state.arriving_list[instance, index] = state.arriving_list[instance, state.arriving_count[instance]]
            break
    if state.closed[instance] != 0:  # failed meanwhile; prefill still holds the KV for another pull
        state.free[instance] += state.blocks[request]
        state.blocks[request] = 0
        reroute(state, request, moment)
        return
    state.prefill_place[request] = NOBODY
    state.prefill_free[prefill] += pinned_tokens(state, request)
    state.ready_list[instance, state.ready_count[instance]] = request
    state.ready_count[instance] += 1
    request_step(state, instance, moment)
    start_prefill(state, prefill, moment)


@compiled
def run_until(state: State, moment: float) -> bool:
    """Handle every event up to `moment`, or to when a policy is to be asked; return whether any event is left."""
    requests = len(state.arrival)
    decode = len(state.time)
    while True:
        following = state.counters[NEXT_ARRIVAL]
        arrival = state.arrival[following] if following < requests else np.inf
        transfer = state.heap_keys[0] if state.counters[HEAP_SIZE] > 0 else np.inf
        now = min(arrival, transfer, state.tree[1])
        if now > state.scalars[ASK_AT] and state.scalars[ASK_AT] <= moment:
            state.scalars[NOW] = state.scalars[ASK_AT]
            return True
        if now > moment or now == np.inf:
            state.scalars[NOW] = moment
            return bool(now != np.inf)
        state.counters[EVENTS] += 1
        if arrival == now:
            state.counters[NEXT_ARRIVAL] += 1
            arrive(state, following, now)
        elif transfer == now:
            item = state.heap_items[0]
            size = state.counters[HEAP_SIZE]
            state.counters[HEAP_SIZE] = heap_pop(state.heap_keys, state.heap_items, size)
            request, kind = item // KINDS, item % KINDS
            if kind == PULL_DONE:
                pull_done(state, request, now)
            elif kind == COPY_DONE:
                copy_done(state, request, now)
            else:
                handover_done(state, request, now)
        else:
            leaf = tree_first(state.tree)
            if leaf >= decode:
                finish_prefill(state, leaf - decode, now)
            else:
                wake(state, leaf, now)
                if state.scalars[HOLD] != AT_ONCE:
                    look_again(state, leaf, now)
