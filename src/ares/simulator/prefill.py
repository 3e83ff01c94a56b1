"""The prefill pool: a prompt goes to the instance with the smallest backlog, and each computes one at a time."""

import numpy as np

from ares.simulator.block_cache import enter_prefill
from ares.simulator.blocks import blocks_for
from ares.simulator.heaps import compiled, inlined, tree_set
from ares.simulator.state import (
    BASE_S,
    IN_PREFILL,
    NONE,
    PER_PREFILL_CONTEXT_S,
    PER_PREFILL_S,
    State,
)

# Added to the backlog of an instance that takes no prompts: a prompt goes to the smallest.
CLOSED = 1 << 50


@inlined
def pinned_tokens(state: State, request: int) -> int:
    """Return the tokens of the KV blocks that a prefilled request occupies until it has been pulled."""
    return int(blocks_for(state, state.prompt[request] + state.generated[request]) * state.parameters.block_size)


@compiled
def queue_for_prefill(state: State, request: int, moment: float) -> None:
    """Put a request into the queue of the prefill instance with the smallest backlog, or let the policy choose."""
    if state.parameters.calls_prefill_policy:
        state.status[request] = IN_PREFILL
        state.prefill_order[state.current.prefill_waiting] = request
        state.current.prefill_waiting += 1
        state.current.call_policy_at_s = moment
        return
    tokens = state.prompt[request] + state.generated[request]
    queue_at(state, request, int(np.argmin(state.prefill_backlog)), tokens, moment)


@inlined
def queue_at(state: State, request: int, chosen: int, work: int, moment: float) -> None:
    """Put a request into the queue of a prefill instance, with the tokens that it is expected to compute there."""
    state.status[request] = IN_PREFILL
    state.prefill_work[request] = work
    state.prefill_instance[request] = chosen
    state.prefill_backlog[chosen] += work
    state.next_request[request] = NONE
    if state.prefill_head[chosen] == NONE:
        state.prefill_head[chosen] = request
    else:
        state.next_request[state.prefill_tail[chosen]] = request
    state.prefill_tail[chosen] = request
    start_prefill(state, chosen, moment)


@compiled
def start_prefill(state: State, prefill: int, moment: float) -> None:
    """Start the next prompt of an idle prefill instance if its KV fits together with what is still pinned."""
    request = state.prefill_head[prefill]
    if request == NONE or state.prefill_current[prefill] != NONE:
        return
    tokens = state.prompt[request] + state.generated[request]
    if pinned_tokens(state, request) > state.prefill_free[prefill]:
        return
    state.prefill_head[prefill] = state.next_request[request]
    state.next_request[request] = NONE
    state.prefill_free[prefill] -= pinned_tokens(state, request)
    state.prefill_current[prefill] = request
    cached = enter_prefill(state, request, prefill)
    state.current.prefill_cached_tokens += cached
    new = tokens - cached
    model = state.prefill_step_model[prefill]
    budget = state.parameters.token_budget
    chunks = (new + budget - 1) // budget
    attended = cached + new / 2.0
    time = chunks * model[BASE_S] + model[PER_PREFILL_S] * new + model[PER_PREFILL_CONTEXT_S] * new * attended
    tree_set(state.tree, len(state.time) + prefill, moment + time)
