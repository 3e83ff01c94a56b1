"""Waiting queues and the links that KV travels on.

A transfer takes latency + bytes / bandwidth and holds the sender's outgoing and the receiver's incoming link while
it runs; transfers over one link follow each other in the order in which they were asked for.
"""

from ares.simulator.heaps import compiled, heap_push
from ares.simulator.prediction import expect_anew, learn
from ares.simulator.state import (
    BANDWIDTH,
    FINISHED,
    FINISHED_COUNT,
    HEAP_SIZE,
    INBOUND,
    KINDS,
    KV_BYTES,
    LATENCY_S,
    NOBODY,
    PULL_DONE,
    State,
)


@compiled
def schedule_event(state: State, moment: float, request: int, kind: int) -> None:
    """Put an event of a request on the heap."""
    size = state.counters[HEAP_SIZE]
    state.counters[HEAP_SIZE] = heap_push(state.heap_keys, state.heap_items, size, moment, request * KINDS + kind)


@compiled
def push_back(state: State, instance: int, request: int) -> None:
    """Queue a request behind the waiting of an instance."""
    state.follow[request] = NOBODY
    if state.head[instance] == NOBODY:
        state.head[instance] = request
    else:
        state.follow[state.tail[instance]] = request
    state.tail[instance] = request
    state.waiting_count[instance] += 1
    state.waiting_tokens[instance] += state.prompt[request] + state.generated[request]


@compiled
def push_front(state: State, instance: int, request: int) -> None:
    """Queue a preempted request before the waiting of an instance."""
    state.follow[request] = state.head[instance]
    if state.head[instance] == NOBODY:
        state.tail[instance] = request
    state.head[instance] = request
    state.waiting_count[instance] += 1
    state.waiting_tokens[instance] += state.prompt[request] + state.generated[request]


@compiled
def take_first(state: State, instance: int) -> int:
    """Take the first of the waiting."""
    request = state.head[instance]
    state.head[instance] = state.follow[request]
    if state.head[instance] == NOBODY:
        state.tail[instance] = NOBODY
    state.follow[request] = NOBODY
    state.waiting_count[instance] -= 1
    state.waiting_tokens[instance] -= state.prompt[request] + state.generated[request]
    return int(request)


@compiled
def take_out(state: State, instance: int, request: int) -> None:
    """Take one of the waiting out, wherever it stands."""
    before, at = NOBODY, state.head[instance]
    while at != request:
        before, at = at, state.follow[at]
    if before == NOBODY:
        take_first(state, instance)
        return
    state.follow[before] = state.follow[request]
    if state.tail[instance] == request:
        state.tail[instance] = before
    state.follow[request] = NOBODY
    state.waiting_count[instance] -= 1
    state.waiting_tokens[instance] -= state.prompt[request] + state.generated[request]


@compiled
def transfer_end(state: State, sender_free: float, receiver_free: float, tokens: int, moment: float) -> float:
    """Return when a transfer of the KV of `tokens` tokens leaves both links."""
    start = max(moment, sender_free, receiver_free)
    return float(start + tokens * state.scalars[KV_BYTES] / state.scalars[BANDWIDTH])


@compiled
def start_pull(state: State, instance: int, request: int, moment: float) -> None:
    """Pull the KV of a prefilled request; its blocks are taken."""
    prefill = state.prefill_place[request]
    tokens = state.prompt[request] + state.generated[request]
    sender_free = state.prefill_egress_free[prefill]
    end = transfer_end(state, sender_free, state.ingress_free[instance], tokens, moment)
    state.prefill_egress_free[prefill] = end
    state.ingress_free[instance] = end
    state.status[request] = INBOUND
    state.inbound_count[instance] += 1
    state.arriving_list[instance, state.arriving_count[instance]] = request
    state.arriving_count[instance] += 1
    schedule_event(state, end + state.scalars[LATENCY_S], request, PULL_DONE)


@compiled
def note_finish(state: State, request: int, moment: float) -> None:
    """Record the end of a request."""
    state.status[request] = FINISHED
    state.finish[request] = moment
    state.moving[request] = 0
    learn(state, request)
    state.counters[FINISHED_COUNT] += 1
    expect_anew(state)
