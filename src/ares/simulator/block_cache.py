"""The prefix cache of each instance: which blocks it has, who uses them, and which one is evicted next.

As in vLLM (v1/core/block_pool.py, 0.32): a block that no request uses stays cached in memory that is free, and the one
that has been unused for longest leaves when that memory is wanted. Requests that begin alike share blocks. The blocks
are those that a trace names, of `parameters.cached_block_tokens` tokens (0: there are no prefix caches), and only the
full ones of prompts: what the output of one turn adds to the next one's prompt is computed again.

Caches 0 to D - 1 are those of the decode instances, the others those of the prefill instances. Each is a hash table
(open addressing, linear probing) over slots; unused slots form a list from the newest to the oldest.
"""

from ares.simulator.heaps import compiled, inlined
from ares.simulator.state import NONE, State

_EMPTY = -1
_SPREAD = 0x9E3779B97F4A7C1  # odd, near 2 ** 60 times the golden ratio: consecutive names are far apart


@inlined
def _home(name: int, width: int) -> int:
    """Return the first entry of the table where a name may stand; `width` is a power of two."""
    return int(((name * _SPREAD) >> 20) & (width - 1))


@compiled
def _find(state: State, cache: int, name: int) -> int:
    """Return the slot of a block, NONE where it is not cached."""
    table = state.cache_table[cache]
    at = _home(name, len(table))
    while table[at] != _EMPTY:
        if state.cache_name[cache, table[at]] == name:
            return int(table[at])
        at = (at + 1) & (len(table) - 1)
    return NONE


@inlined
def _forget(state: State, cache: int, slot: int) -> None:
    """Take a block out of the table, and give its slot back."""
    table = state.cache_table[cache]
    last = len(table) - 1
    at = _home(state.cache_name[cache, slot], len(table))
    while table[at] != slot:
        at = (at + 1) & last
    # Entries behind it that could not stand nearer to their homes move up.
    following = (at + 1) & last
    while table[following] != _EMPTY:
        home = _home(state.cache_name[cache, table[following]], len(table))
        if ((following - home) & last) >= ((following - at) & last):
            table[at] = table[following]
            at = following
        following = (following + 1) & last
    table[at] = _EMPTY
    state.cache_newer[cache, slot] = state.cache_spare[cache]
    state.cache_spare[cache] = slot


@inlined
def _unlink(state: State, cache: int, slot: int) -> None:
    """Take a slot out of the list of the unused."""
    newer, older = state.cache_newer[cache, slot], state.cache_older[cache, slot]
    if newer == NONE:
        state.cache_newest[cache] = older
    else:
        state.cache_older[cache, newer] = older
    if older == NONE:
        state.cache_oldest[cache] = newer
    else:
        state.cache_newer[cache, older] = newer
    state.cache_unused[cache] -= 1


@compiled
def evict(state: State, cache: int, room: int) -> None:
    """Evict blocks until at most `room` are unused."""
    while state.cache_unused[cache] > max(room, 0):
        slot = state.cache_oldest[cache]
        _unlink(state, cache, slot)
        _forget(state, cache, slot)


@compiled
def evict_for_decode(state: State, instance: int) -> None:
    """Evict what no longer fits the free blocks of a decode instance."""
    if state.parameters.cached_block_tokens > 0:
        tokens = state.free[instance] * state.parameters.block_size
        evict(state, instance, tokens // state.parameters.cached_block_tokens)


@compiled
def cached_tokens(state: State, cache: int, request: int) -> int:
    """Return how many of a request's tokens are cached, from the first on; the last token is computed in any case."""
    size = state.parameters.cached_block_tokens
    if size == 0:
        return 0
    first = state.first_block[request]
    most = min(state.first_block[request + 1] - first, (state.prompt[request] + state.generated[request] - 1) // size)
    count = 0
    while count < most and _find(state, cache, state.block_names[first + count]) != NONE:
        count += 1
    return int(count * size)


@compiled
def use_blocks(state: State, cache: int, request: int, start: int, end: int) -> int:
    """Use the blocks of a request from index `start` up to `end`; return how many others use already.

    A block that is not cached is from now on.
    """
    first, shared = state.first_block[request], 0
    for index in range(first + start, first + end):
        name = state.block_names[index]
        slot = _find(state, cache, name)
        if slot != NONE:
            if state.cache_users[cache, slot] == 0:
                _unlink(state, cache, slot)
            else:
                shared += 1
            state.cache_users[cache, slot] += 1
            continue
        if state.cache_spare[cache] == NONE:
            evict(state, cache, state.cache_unused[cache] - 1)
        slot = state.cache_spare[cache]
        state.cache_spare[cache] = state.cache_newer[cache, slot]
        state.cache_name[cache, slot] = name
        state.cache_users[cache, slot] = 1
        table = state.cache_table[cache]
        at = _home(name, len(table))
        while table[at] != _EMPTY:
            at = (at + 1) & (len(table) - 1)
        table[at] = slot
    return shared


@compiled
def leave_blocks(state: State, cache: int, request: int, count: int) -> int:
    """Stop using the first `count` blocks of a request, which stay cached; return how many others still use.

    A prompt's first block is the last one to be evicted, as in vLLM.
    """
    first, shared = state.first_block[request], 0
    for index in range(first + count - 1, first - 1, -1):
        slot = _find(state, cache, state.block_names[index])
        state.cache_users[cache, slot] -= 1
        if state.cache_users[cache, slot] > 0:
            shared += 1
            continue
        newest = state.cache_newest[cache]
        state.cache_newer[cache, slot], state.cache_older[cache, slot] = NONE, newest
        if newest == NONE:
            state.cache_oldest[cache] = slot
        else:
            state.cache_newer[cache, newest] = slot
        state.cache_newest[cache] = slot
        state.cache_unused[cache] += 1
    return shared


@compiled
def enter_decode(state: State, request: int, instance: int, tokens: int) -> None:
    """Use the full blocks among the first `tokens` of a request's prompt at a decode instance.

    Call it again when it has more. What others use there already takes no further memory.
    """
    size = state.parameters.cached_block_tokens
    if size == 0:
        return
    start = state.used_blocks[request]
    end = min(state.first_block[request + 1] - state.first_block[request], tokens // size)
    if end <= start:
        return
    shared = use_blocks(state, instance, request, start, end)
    state.free[instance] += shared * (size // state.parameters.block_size)
    state.used_blocks[request] = end


@compiled
def leave_decode(state: State, request: int, instance: int) -> None:
    """Stop using the blocks of a request whose memory at a decode instance is freed: others may use some of them."""
    count = state.used_blocks[request]
    if count == 0:
        return
    state.used_blocks[request] = 0
    shared = leave_blocks(state, instance, request, count)
    state.free[instance] -= shared * (state.parameters.cached_block_tokens // state.parameters.block_size)


@inlined
def enter_prefill(state: State, request: int, prefill: int) -> int:
    """Use all blocks of a prompt that a prefill instance computes; return the tokens that are cached there.

    Its memory counts in full, shared or not: it is pinned until it is pulled.
    """
    size = state.parameters.cached_block_tokens
    if size == 0:
        return 0
    cache = len(state.time) + prefill
    found = cached_tokens(state, cache, request)
    count = state.first_block[request + 1] - state.first_block[request]
    use_blocks(state, cache, request, 0, count)
    state.pinned_blocks[request] = count
    evict(state, cache, state.prefill_free[prefill] // size)
    return found


@compiled
def leave_prefill(state: State, request: int, prefill: int) -> None:
    """Stop using a prompt's blocks at the prefill instance that frees its KV."""
    if state.pinned_blocks[request] > 0:
        leave_blocks(state, len(state.time) + prefill, request, state.pinned_blocks[request])
        state.pinned_blocks[request] = 0
