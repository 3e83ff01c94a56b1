"""The whole state of a simulated cluster as flat arrays, and the meaning of each.

R requests, D decode instances, P prefill instances, B slots a decode instance, Q quantiles. Compiled functions take a
State as one pointer (numba_state.py); nothing else holds state, so a run is a function of its inputs and seed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ares.policy.admission.forecast import GRID
from ares.policy.admission.state import ADMISSION_STATES, LoopSettings
from ares.policy.length_curves import LAST
from ares.policy.residual_life import REMEMBERED

F8 = NDArray[np.float64]
I8 = NDArray[np.int64]

# Values of `status`, after those of admission (policy/admission/state.py): WAITING outside decode, SUSPENDED, ADMITTED
# until that is carried out. QUEUED: in the waiting queue of a decode instance, which is vLLM's WAITING.
ARRIVING, IN_PREFILL, QUEUED, PULLING_KV, DECODING, RECOMPUTING, HANDOVER, FINISHED = range(
    ADMISSION_STATES, ADMISSION_STATES + 8
)

# Values of `leaving`: stays, migrates (its KV is being copied), or is suspended at the next step.
NOT_LEAVING, MIGRATING, SUSPENDING = range(3)

# Columns of `step_model`, one row per instance.
BASE_S, PER_REQUEST_S, PER_RESIDENT_S, PER_PREFILL_S, PER_PREFILL_CONTEXT_S = range(5)

# Kinds of transfer on the event heap: item = request * KINDS + kind.
PULL_DONE, COPY_DONE, HANDOVER_DONE, KINDS = range(4)

# Values of `admission_mode`: dispatch at once, wait for the policy's compiled loop, or for a policy called in Python.
IMMEDIATE, BY_COMPILED_LOOP, BY_PYTHON_POLICY = range(3)

NONE = -1


# Constants of a run, one record (`Simulation.build` in cluster.py); flags are 0 or 1.
PARAMETERS = np.dtype(
    [
        ("block_size", np.int64),
        ("token_budget", np.int64),  # of one step: max_num_batched_tokens
        ("max_batch", np.int64),
        ("watermark_blocks", np.int64),
        ("kv_bytes_per_token", np.int64),
        ("bandwidth_bytes_s", np.float64),
        ("latency_s", np.float64),
        ("stall_s", np.float64),
        ("dispatch_rule", np.int64),  # as in policy/dispatch/base.py
        ("admission_mode", np.int64),
        ("preempts_largest", np.int64),
        ("first_come_first_served", np.int64),
        ("seed", np.int64),  # of the errors of predictions
        ("sigma_start", np.float64),
        ("sigma_end", np.float64),
        ("sigma_tokens", np.float64),
        ("has_predictions", np.int64),
        ("residual_life", np.int64),
        ("longest_output", np.int64),
        ("ended_before", np.int64),  # outputs that had ended when the run began
        ("prefill_resumes", np.int64),  # suspended requests resume on a prefill instance
        ("first_at_prefill", np.int64),  # the client gets the first token from prefill
        ("cached_block_tokens", np.int64),  # of the blocks that prefix caches have; 0: there are none
        ("calls_prefill_policy", np.int64),  # a policy in Python chooses where a prompt is computed
    ],
    align=True,
)
# Counters, sizes of lists and times that belong to no request or instance, one record.
CURRENT = np.dtype(
    [
        ("now_s", np.float64),
        ("events", np.int64),
        ("finished", np.int64),
        ("preemptions", np.int64),
        ("oom_events", np.int64),
        ("migrations", np.int64),
        ("migrated_bytes", np.int64),
        ("migrations_cancelled", np.int64),
        ("migrations_refused", np.int64),
        ("suspensions", np.int64),
        ("block_errors", np.int64),
        ("next_arrival", np.int64),
        ("next_sequence", np.int64),
        ("heap_size", np.int64),
        ("queue_size", np.int64),
        ("by_age_start", np.int64),
        ("by_age_end", np.int64),
        ("suspended_count", np.int64),
        ("round_robin_cursor", np.int64),
        ("changes_seen", np.int64),  # events that may have made room, up to the last call of the policy
        ("age_credit", np.float64),
        ("next_ttft_miss_s", np.float64),  # when the next waiting request misses its TTFT, at the earliest
        ("prefill_waiting", np.int64),  # prompts that the prefill policy is to place
        ("prefill_cached_tokens", np.int64),  # tokens that prefill found cached, and did not compute
        ("pull_cached_tokens", np.int64),  # tokens that decode found cached, and did not pull
        ("pull_tokens", np.int64),  # tokens of the requests whose KV was pulled, cached ones included
        ("admission_due", np.int64),  # 1 where an event has made room or has added a request that waits
        ("call_policy_at_s", np.float64),  # when a policy in Python is to be called (python_policies.py), or infinite
    ],
    align=True,
)

ADMISSION_SETTINGS = np.dtype([(name, np.float64) for name in LoopSettings._fields], align=True)


@dataclass(frozen=True, slots=True)
class State:
    """Everything that changes while a simulation runs, and the constants its events read."""

    # requests, shape (R,)
    arrival: F8
    prompt: I8
    output: I8
    status: I8  # as above
    decode_instance: I8  # NONE before dispatch
    prefill_instance: I8
    generated: I8  # as of the last time the request left a decode slot
    computed: I8  # tokens computed so far while (re)computing a prompt on a decode instance
    slot: I8  # index into the slots of its instance while DECODING
    first_token: F8
    finish: F8
    blocks: I8  # KV blocks held while not in a slot (PULLING_KV, RECOMPUTING)
    next_request: I8  # next request in a linked list (waiting or prefill queue)
    preempted: I8  # how often
    moved: I8  # how often it has migrated
    target: I8  # target of a move whose copy is in flight, NONE otherwise
    leaving: I8  # NOT_LEAVING, MIGRATING or SUSPENDING; NOT_LEAVING again once it has ended or was preempted
    reserved: I8  # blocks reserved at `target`
    sequence: I8  # order of entering the running batch; the newest is preempted first
    last_move: F8
    suspended_list: I8  # the suspended requests, in the order in which they were suspended
    waiting_since: F8  # arrival, or suspension
    preemption_key: F8  # the request with the largest is preempted first, where not the newest is
    queue_key: F8  # the request with the smallest is admitted first
    rank: I8  # of its class: a smaller one is admitted before every larger one
    ttft_missed: I8  # 1 once it has missed its TTFT while it waited
    ttft: F8  # objectives, seconds
    tpot: F8
    gap: F8

    # requests as admission saw them last: what a live engine's telemetry reports, shape (R,) and (R, Q)
    suspendable: I8  # 1 where it may be suspended
    observed_tokens: I8
    observed_generated: I8
    observed_remaining: F8
    paused_since: F8  # when it left its slot, NaN while it decodes
    kv_since: F8  # when its prefill ended
    longest_gap: F8  # longest time between two tokens of its stream, seconds
    error_constant: F8  # the part of a prediction's error that stays the same, once drawn
    error_redrawn: F8  # the part drawn again in each epoch
    error_epoch: I8  # of `error_redrawn`; 0: nothing drawn yet

    # outputs that have ended, as policy/residual_life.py keeps them, shape (REMEMBERED,)
    recent_outputs: I8
    sorted_outputs: I8

    # the same by what is known of requests, as policy/length_curves.py keeps them: C cells of L bins, N chains of at
    # most K cells; all are empty where lengths are not estimated so
    length_chain: I8  # (R,) the chain of each request
    chain_cells: I8  # (N, K) from the general to the particular, NONE behind the last
    chain_longer: F8  # (N, L) the curve of each chain
    chain_outputs: I8  # (N,) how many outputs had ended when it was composed
    cell_ended: F8  # (C, L)
    cell_cut: F8  # (C, L)
    cell_count: F8  # (C,)

    # prefix caches (block_cache.py)
    first_block: I8  # (R + 1,) where the full blocks of each prompt begin in `block_names`
    block_names: I8  # equal numbers are equal blocks with equal beginnings
    used_blocks: I8  # (R,) how many of them each request uses at its decode instance
    pinned_blocks: I8  # (R,) the same at its prefill instance
    cache_table: I8  # (D + P, H) hash tables of slots
    cache_name: I8  # (D + P, C) the block of each slot
    cache_users: I8  # (D + P, C) how many requests use it
    cache_newer: I8  # (D + P, C) the list of unused slots; of spare ones: the next spare one
    cache_older: I8
    cache_newest: I8  # (D + P,) its ends and its length
    cache_oldest: I8
    cache_unused: I8
    cache_spare: I8  # (D + P,) the first slot without a block
    # tokens that each decode instance had cached of each request when it was looked up for admission, shape (R, D);
    # (0, 0) where admission does not weigh them
    cached_at: I8

    # decode instances, shape (D,)
    time: F8  # start of the step that runs now
    step: I8  # index of that step
    planned: I8  # steps until the next event of this instance, 0 while idle
    batch: I8
    resident: I8  # tokens attended by the step that runs now, over its decoding requests
    free: I8  # free blocks after what the step that runs now has taken
    total_blocks: I8
    closed: I8  # 1 = takes no new requests
    head: I8  # first and last of its own waiting queue, linked by `next_request`
    tail: I8
    waiting_count: I8
    unallocated_tokens: (
        I8  # of its queue and of `prefilling_list`: their tokens less those of the blocks that they hold
    )
    inbound_count: I8  # requests whose KV is being pulled or copied to it
    promised: I8  # blocks reserved for migrations towards it
    prefilling: I8  # number of requests in `prefilling_list`
    ready_count: I8  # number of requests in `ready_list`
    ingress_free: F8  # when the link into the instance is free again
    egress_free: F8
    step_model: F8  # (D, 5): columns as above, BASE_S and the others

    # decode slots, shape (D, B)
    slot_request: I8
    slot_finish: I8  # step index at whose start the request is done
    prefilling_list: I8
    ready_list: I8  # requests whose KV has arrived and that join at the next step
    arriving_list: I8  # requests whose KV is being pulled from prefill
    leaving_list: I8  # requests that leave at the next step: copied ones, and those to be suspended
    arriving_count: I8  # (D,)
    leaving_count: I8  # (D,)
    phase: I8  # (D, block size): how many requests take a new block at a step congruent to the column

    # forecast for admission, shape (D, G) and (G,)
    expected: F8
    variance: F8
    row_request: I8  # (D, B) requests that ran when the forecast was made
    row_count: I8  # (D,)
    grid: F8
    forecast_time: F8  # (D,) when each was made; -inf: before something changed

    # prefill instances, shape (P,)
    prefill_head: I8  # first and last of its queue, linked by `next_request`
    prefill_tail: I8
    prefill_current: I8  # the request whose prompt is being computed, NONE while idle
    prefill_backlog: I8  # tokens queued and running
    prefill_free: I8  # free tokens of KV
    prefill_egress_free: F8
    prefill_order: I8  # (R + 1,) prompts that the prefill policy is to place, in order of arrival
    prefill_work: I8  # (R,) tokens with which each counts in `prefill_backlog`
    prefill_step_model: F8  # (P, 5)

    # events
    tree: F8  # tournament tree of the next event of D + P instances; entry 1, its root, is the earliest
    heap_keys: F8  # heap of transfers by the time of their end
    heap_items: I8  # request * KINDS + kind of each
    order: I8  # requests that wait for admission, in the order in which they are admitted (R,)
    by_age: I8  # and in the order in which they arrived (R,)
    # records, shape (1,) each; read by the properties of the same names without `_array`
    current_array: NDArray[np.void]
    parameters_array: NDArray[np.void]
    admission_settings_array: NDArray[np.void]

    # what compiled code reads instead of this object: WORDS words per array, its address and lengths
    table: I8 = field(init=False)
    address: int = field(init=False)

    def __post_init__(self) -> None:
        """Write the table; ValueError where an array is not 64-bit and C-contiguous."""
        table = np.zeros((len(NAMES), WORDS), np.int64)
        for row, (name, array) in zip(table, self.arrays(), strict=True):
            wide = array.itemsize == 8 or array.dtype.names is not None
            if not (wide and array.flags.c_contiguous and array.flags.writeable):
                raise ValueError(f"{name}: must be a C-contiguous, writeable array of 64-bit numbers")
            row[0] = array.ctypes.data
            row[1 : 1 + array.ndim] = array.shape
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "address", table.ctypes.data)

    @property
    def parameters(self) -> Any:
        """The record of PARAMETERS."""
        return self.parameters_array[0]

    @property
    def current(self) -> Any:
        """The record of CURRENT."""
        return self.current_array[0]

    @property
    def admission_settings(self) -> Any:
        """Settings of admission, as `LoopSettings` in policy/admission/state.py."""
        return self.admission_settings_array[0]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by the arrays: addresses mean nothing elsewhere."""
        return State, tuple(array for _, array in self.arrays())

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield the name and the array of every field, in order."""
        for name in NAMES:
            yield name, getattr(self, name)


RECORDS = {"parameters": PARAMETERS, "current": CURRENT, "admission_settings": ADMISSION_SETTINGS}
NAMES = tuple(entry.name for entry in fields(State) if entry.init)
WORDS = 3


def allocate(
    requests: int,
    decode: int,
    prefill: int,
    slots: int,
    block_size: int,
    quantiles: int = 3,
    length_cells: tuple[int, int, int] = (0, 0, 0),
    cached_blocks: tuple[int, int] = (0, 0),
    weighs_cached: bool = False,
) -> State:
    """Make an empty state; `build` in cluster.py fills in the inputs.

    `length_cells`: how many cells there are, how many chains of them, and the most cells of a chain. `cached_blocks`:
    how many blocks the prompts have together, and how many a prefix cache has at most. `weighs_cached`: whether
    admission weighs what decode instances have cached.
    """
    cells, chains, of_chain = length_cells

    def ints(*shape: int, value: int = 0) -> I8:
        return np.full(shape, value, np.int64)

    def floats(*shape: int, value: float = 0.0) -> F8:
        return np.full(shape, value, np.float64)

    names, slots_of_cache = cached_blocks
    caches = decode + prefill if slots_of_cache else 0
    width = 1
    while width < 2 * slots_of_cache:
        width *= 2
    spare = np.append(np.arange(1, slots_of_cache), NONE)[:slots_of_cache]
    leaves = 1
    while leaves < decode + prefill:
        leaves *= 2
    return State(
        arrival=floats(requests),
        prompt=ints(requests),
        output=ints(requests),
        status=ints(requests, value=ARRIVING),
        decode_instance=ints(requests, value=NONE),
        prefill_instance=ints(requests, value=NONE),
        generated=ints(requests),
        computed=ints(requests),
        slot=ints(requests, value=NONE),
        first_token=floats(requests, value=np.nan),
        finish=floats(requests, value=np.nan),
        blocks=ints(requests),
        next_request=ints(requests, value=NONE),
        preempted=ints(requests),
        moved=ints(requests),
        target=ints(requests, value=NONE),
        leaving=ints(requests),
        reserved=ints(requests),
        sequence=ints(requests),
        last_move=floats(requests, value=-np.inf),
        suspended_list=ints(requests),
        waiting_since=floats(requests),
        preemption_key=floats(requests),
        queue_key=floats(requests),
        rank=ints(requests),
        ttft_missed=ints(requests),
        ttft=floats(requests, value=np.inf),
        tpot=floats(requests, value=np.inf),
        gap=floats(requests, value=np.inf),
        suspendable=ints(requests),
        observed_tokens=ints(requests),
        observed_generated=ints(requests),
        observed_remaining=floats(requests, quantiles),
        paused_since=floats(requests, value=np.nan),
        kv_since=floats(requests),
        longest_gap=floats(requests),
        error_constant=floats(requests),
        error_redrawn=floats(requests),
        error_epoch=ints(requests),
        recent_outputs=ints(REMEMBERED),
        sorted_outputs=ints(REMEMBERED),
        length_chain=ints(requests if cells else 0),
        chain_cells=ints(chains, of_chain, value=NONE),
        chain_longer=floats(chains, len(LAST)),
        chain_outputs=ints(chains, value=NONE),
        cell_ended=floats(cells, len(LAST)),
        cell_cut=floats(cells, len(LAST)),
        cell_count=floats(cells),
        first_block=ints(requests + 1 if caches else 1),
        block_names=ints(names),
        used_blocks=ints(requests),
        pinned_blocks=ints(requests),
        cache_table=ints(caches, width, value=NONE),
        cache_name=ints(caches, slots_of_cache),
        cache_users=ints(caches, slots_of_cache),
        cache_newer=np.tile(spare.astype(np.int64), (caches, 1)),
        cache_older=ints(caches, slots_of_cache, value=NONE),
        cache_newest=ints(caches, value=NONE),
        cache_oldest=ints(caches, value=NONE),
        cache_unused=ints(caches),
        cache_spare=ints(caches),
        cached_at=ints(requests if weighs_cached else 0, decode if weighs_cached else 0),
        time=floats(decode),
        step=ints(decode),
        planned=ints(decode),
        batch=ints(decode),
        resident=ints(decode),
        free=ints(decode),
        total_blocks=ints(decode),
        closed=ints(decode),
        head=ints(decode, value=NONE),
        tail=ints(decode, value=NONE),
        waiting_count=ints(decode),
        unallocated_tokens=ints(decode),
        inbound_count=ints(decode),
        promised=ints(decode),
        prefilling=ints(decode),
        ready_count=ints(decode),
        ingress_free=floats(decode),
        egress_free=floats(decode),
        step_model=floats(decode, 5),
        slot_request=ints(decode, slots, value=NONE),
        slot_finish=ints(decode, slots),
        prefilling_list=ints(decode, slots, value=NONE),
        ready_list=ints(decode, slots, value=NONE),
        leaving_list=ints(decode, slots, value=NONE),
        leaving_count=ints(decode),
        arriving_list=ints(decode, slots, value=NONE),
        arriving_count=ints(decode),
        phase=ints(decode, block_size),
        expected=floats(decode, len(GRID)),
        variance=floats(decode, len(GRID)),
        row_request=ints(decode, slots, value=NONE),
        row_count=ints(decode),
        grid=GRID.astype(np.float64),
        forecast_time=floats(decode, value=-np.inf),
        prefill_head=ints(prefill, value=NONE),
        prefill_tail=ints(prefill, value=NONE),
        prefill_current=ints(prefill, value=NONE),
        prefill_backlog=ints(prefill),
        prefill_free=ints(prefill),
        prefill_egress_free=floats(prefill),
        prefill_order=ints(requests + 1),
        prefill_work=ints(requests),
        prefill_step_model=floats(prefill, 5),
        tree=floats(2 * leaves, value=np.inf),
        heap_keys=floats(requests + 1),
        heap_items=ints(requests + 1),
        order=ints(requests + 1),
        by_age=ints(requests + 1),
        current_array=np.zeros(1, CURRENT).view(np.recarray),
        parameters_array=np.zeros(1, PARAMETERS).view(np.recarray),
        admission_settings_array=np.zeros(1, ADMISSION_SETTINGS).view(np.recarray),
    )
