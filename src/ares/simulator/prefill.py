"""The prefill pool: one prompt at a time on each instance, the least backlog first."""

import numpy as np

from ares.simulator.blocks import blocks_for
from ares.simulator.heaps import compiled, tree_set
from ares.simulator.state import (
    BASE_S,
    BLOCK_SIZE,
    BUDGET,
    NOBODY,
    PER_PREFILL_CONTEXT_S,
    PER_PREFILL_S,
    PREFILL,
    State,
)


@compiled
def pinned_tokens(state: State, request: int) -> int:
    """Return the tokens of the KV blocks that a prefilled request holds until it has been pulled."""
    return blocks_for(state, state.prompt[request] + state.generated[request]) * int(state.scalars[BLOCK_SIZE])


@compiled
def to_prefill(state: State, request: int, moment: float) -> None:
    """Send a request to the prefill instance with the least queued work."""
    chosen = int(np.argmin(state.prefill_backlog))
    state.status[request] = PREFILL
    state.prefill_place[request] = chosen
    state.prefill_backlog[chosen] += state.prompt[request] + state.generated[request]
    state.follow[request] = NOBODY
    if state.prefill_head[chosen] == NOBODY:
        state.prefill_head[chosen] = request
    else:
        state.follow[state.prefill_tail[chosen]] = request
    state.prefill_tail[chosen] = request
    start_prefill(state, chosen, moment)


@compiled
def start_prefill(state: State, prefill: int, moment: float) -> None:
    """Start the next prompt of an idle prefill instance if its KV fits beside what is still pinned."""
    request = state.prefill_head[prefill]
    if request == NOBODY or state.prefill_current[prefill] != NOBODY:
        return
    tokens = state.prompt[request] + state.generated[request]
    if pinned_tokens(state, request) > state.prefill_free[prefill]:
        return
    state.prefill_head[prefill] = state.follow[request]
    state.follow[request] = NOBODY
    state.prefill_free[prefill] -= pinned_tokens(state, request)
    state.prefill_current[prefill] = request
    law = state.prefill_law[prefill]
    budget = int(state.scalars[BUDGET])
    chunks = (tokens + budget - 1) // budget
    time = chunks * law[BASE_S] + law[PER_PREFILL_S] * tokens + law[PER_PREFILL_CONTEXT_S] * tokens * (tokens / 2.0)
    tree_set(state.tree, len(state.time) + prefill, moment + time)
