"""Waiting queues of instances, and KV transfers over the links between them.

A transfer takes latency + bytes / bandwidth and holds the sender's outgoing and the receiver's incoming link while
it runs; transfers over one link follow each other in the order in which they were requested.
"""

from ares.simulator.heaps import compiled, heap_push, inlined
from ares.simulator.prediction import record_length, refresh_predictions
from ares.simulator.state import (
    FINISHED,
    KINDS,
    NONE,
    NOT_LEAVING,
    PULL_DONE,
    PULLING_KV,
    State,
)


@inlined
def schedule_event(state: State, moment: float, request: int, kind: int) -> None:
    """Put an event of a request on the heap."""
    size = state.current.heap_size
    state.current.heap_size = heap_push(state.heap_keys, state.heap_items, size, moment, request * KINDS + kind)


@inlined
def push_back(state: State, instance: int, request: int) -> None:
    """Append a request to the waiting queue of an instance."""
    state.next_request[request] = NONE
    if state.head[instance] == NONE:
        state.head[instance] = request
    else:
        state.next_request[state.tail[instance]] = request
    state.tail[instance] = request
    state.waiting_count[instance] += 1
    state.unallocated_tokens[instance] += state.prompt[request] + state.generated[request]


@inlined
def push_front(state: State, instance: int, request: int) -> None:
    """Put a preempted request at the front of the waiting queue of an instance."""
    state.next_request[request] = state.head[instance]
    if state.head[instance] == NONE:
        state.tail[instance] = request
    state.head[instance] = request
    state.waiting_count[instance] += 1
    state.unallocated_tokens[instance] += state.prompt[request] + state.generated[request]


@inlined
def take_first(state: State, instance: int) -> int:
    """Remove and return the first request of the waiting queue of an instance."""
    request = state.head[instance]
    state.head[instance] = state.next_request[request]
    if state.head[instance] == NONE:
        state.tail[instance] = NONE
    state.next_request[request] = NONE
    state.waiting_count[instance] -= 1
    state.unallocated_tokens[instance] -= state.prompt[request] + state.generated[request]
    return int(request)


@inlined
def remove_waiting(state: State, instance: int, request: int) -> None:
    """Remove a request from the waiting queue of its instance."""
    before, at = NONE, state.head[instance]
    while at != request:
        before, at = at, state.next_request[at]
    if before == NONE:
        take_first(state, instance)
        return
    state.next_request[before] = state.next_request[request]
    if state.tail[instance] == request:
        state.tail[instance] = before
    state.next_request[request] = NONE
    state.waiting_count[instance] -= 1
    state.unallocated_tokens[instance] -= state.prompt[request] + state.generated[request]


@inlined
def transfer_end(state: State, sender_free: float, receiver_free: float, tokens: int, moment: float) -> float:
    """Return when a transfer of the KV of `tokens` tokens has passed both links, seconds; its latency comes after."""
    start = max(moment, sender_free, receiver_free)
    return float(start + tokens * state.parameters.kv_bytes_per_token / state.parameters.bandwidth_bytes_s)


@inlined
def start_pull(state: State, instance: int, request: int, cached: int, moment: float) -> None:
    """Pull the KV of a prefilled request, but for the tokens that are cached; its blocks are allocated already."""
    prefill = state.prefill_instance[request]
    tokens = state.prompt[request] + state.generated[request]
    state.current.pull_tokens += tokens
    state.current.pull_cached_tokens += cached
    sender_free = state.prefill_egress_free[prefill]
    end = transfer_end(state, sender_free, state.ingress_free[instance], tokens - cached, moment)
    state.prefill_egress_free[prefill] = end
    state.ingress_free[instance] = end
    state.status[request] = PULLING_KV
    state.inbound_count[instance] += 1
    state.arriving_list[instance, state.arriving_count[instance]] = request
    state.arriving_count[instance] += 1
    schedule_event(state, end + state.parameters.latency_s, request, PULL_DONE)


@compiled
def record_finish(state: State, request: int, moment: float) -> None:
    """Record the end of a request."""
    state.status[request] = FINISHED
    state.finish[request] = moment
    state.leaving[request] = NOT_LEAVING
    record_length(state, request)
    state.current.finished += 1
    refresh_predictions(state)
