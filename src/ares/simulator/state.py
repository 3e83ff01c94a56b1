"""The whole state of a simulated cluster as flat arrays, and what one array means.

R requests, D decode instances, P prefill instances, B slots a decode instance, Q quantiles. Compiled functions take a
State as one pointer (pointer.py); nothing else holds state, so a run is a function of its inputs and seed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ares.policy.admission.forecast import GRID
from ares.policy.admission.state import Knobs
from ares.policy.residual_life import REMEMBERED

F8 = NDArray[np.float64]
I8 = NDArray[np.int64]

# Status of a request.
ARRIVING, PREFILL, HELD, WAITING, INBOUND, DECODING, RECOMPUTING, HANDOVER, FINISHED, SUSPENDED = range(10)

# Counters.
FINISHED_COUNT, PREEMPTIONS, OOM_EVENTS, MIGRATIONS, MIGRATED_BYTES, MIGRATIONS_CANCELLED, NEXT_ARRIVAL, SEQUENCE = (
    range(8)
)
(
    HEAP_SIZE,
    QUEUE_SIZE,
    AGE_HEAD,
    AGE_TAIL,
    ROBIN,
    BLOCK_ERRORS,
    REFUSED,
    EVENTS,
    SUSPENDED_COUNT,
    SUSPENSIONS,
    CHANGES,
) = range(8, 19)
COUNTERS = 19

# Columns of `law`, one row an instance.
BASE_S, PER_REQUEST_S, PER_RESIDENT_S, PER_PREFILL_S, PER_PREFILL_CONTEXT_S = range(5)

# Kinds of transfer on the event heap: item = request * KINDS + kind.
PULL_DONE, COPY_DONE, HANDOVER_DONE, KINDS = range(4)

# Values of HOLD: dispatch at once, hold for the policy's compiled loop, or for what the policy says in Python.
AT_ONCE, BY_LOOP, BY_ASKING = range(3)

NOBODY = -1


@dataclass(frozen=True, slots=True)
class State:
    """Everything that changes while a simulation runs, and the constants its events read."""

    # requests, shape (R,)
    arrival: F8
    prompt: I8
    output: I8
    status: I8
    place: I8  # decode instance, NOBODY before dispatch
    prefill_place: I8
    generated: I8  # as of the last time the request left a decode slot
    computed: I8  # tokens computed so far while (re)computing a prompt on a decode instance
    slot: I8  # index into the slots of its instance while DECODING
    first_token: F8
    finish: F8
    blocks: I8  # KV blocks held while not in a slot (INBOUND, RECOMPUTING)
    follow: I8  # next request in a linked list (waiting or prefill queue)
    preempted: I8
    moved: I8
    target: I8  # target of a move whose copy is in flight, NOBODY otherwise
    moving: I8  # 1 while that copy is still wanted: neither preempted nor done since; 2 while it is to be suspended
    reserved: I8  # blocks reserved at `target`
    sequence: I8  # order of entering the running batch; the newest is preempted first
    last_move: F8
    suspended_list: I8
    waits_since: F8  # arrival, or suspension
    eviction_key: F8  # who is preempted first when blocks run out: the largest
    queue_key: F8  # who is admitted first: the smallest
    rank: I8  # of its class: a smaller one is admitted before every larger one
    missed: I8  # 1 once it has missed its first token while it waited
    ttft: F8  # objectives, seconds
    tpot: F8
    gap: F8

    # requests as admission saw them last: what the telemetry of a live engine would say, shape (R,) and (R, Q)
    outside: I8  # as in policy/admission/state.py
    movable: I8  # 1 where it may be suspended
    seen_tokens: I8
    seen_generated: I8
    seen_remaining: F8
    silent_since: F8  # when it left its slot, NaN while it decodes
    kv_since: F8  # when its prefill ended
    longest_gap: F8  # seconds that its stream stood still at most
    error_own: F8  # the part of a prediction's error that stays for life, once drawn
    error_fresh: F8  # and the part drawn anew in each epoch
    error_epoch: I8  # of `error_fresh`; 0: nothing drawn yet

    # outputs that have ended, as policy/residual_life.py keeps them, shape (REMEMBERED,)
    ended_lately: I8
    ended_sorted: I8

    # decode instances, shape (D,)
    time: F8  # start of the step that runs now
    step: I8  # index of that step
    planned: I8  # steps until the next event of this instance, 0 while idle
    batch: I8
    resident: I8  # tokens attended by the step that runs now, over its decoding requests
    free: I8  # free blocks after what the step that runs now has taken
    total_blocks: I8
    closed: I8  # 1 = takes no new requests
    head: I8  # waiting queue
    tail: I8
    waiting_count: I8
    waiting_tokens: I8
    inbound_count: I8
    promised: I8  # blocks reserved for moves on their way
    prefilling: I8  # number of requests in `prefilling_list`
    ready_count: I8
    ingress_free: F8  # when the link into the instance is free again
    egress_free: F8
    law: F8  # (D, 5)

    # decode slots, shape (D, B)
    slot_request: I8
    slot_finish: I8  # step index at whose start the request is done
    prefilling_list: I8
    ready_list: I8  # requests whose KV has arrived and who join at the next step
    arriving_list: I8  # requests whose KV is being pulled from prefill
    leaving_list: I8
    arriving_count: I8  # (D,)
    leaving_count: I8  # (D,)
    phase: I8  # (D, block size): how many requests take a new block at a step congruent to the column

    # forecast for admission, shape (D, G) and (G,)
    expected: F8
    variance: F8
    row_request: I8  # (D, B) requests that ran when the forecast was made
    row_count: I8  # (D,)
    grid: F8
    forecast_time: F8  # (D,) when each was made

    # prefill instances, shape (P,)
    prefill_head: I8
    prefill_tail: I8
    prefill_current: I8
    prefill_backlog: I8  # tokens queued and running
    prefill_free: I8  # tokens of KV
    prefill_egress_free: F8
    prefill_law: F8  # (P, 5)

    # events
    tree: F8  # tournament over D + P next times
    heap_keys: F8
    heap_items: I8
    order: I8  # held requests in the order in which they are admitted (R,)
    by_age: I8  # and in the order in which they came (R,)
    counters: I8
    scalars: F8  # see cluster.py
    knobs: F8  # settings of admission, as policy/admission/state.py lists them

    # what compiled code reads instead of this object: WORDS words an array, its address and lengths
    table: I8 = field(init=False)
    address: int = field(init=False)

    def __post_init__(self) -> None:
        """Write the table; ValueError where an array is not 64-bit and C-contiguous."""
        table = np.zeros((len(NAMES), WORDS), np.int64)
        for row, (name, array) in zip(table, self.arrays(), strict=True):
            if array.itemsize != 8 or not array.flags.c_contiguous or not array.flags.writeable:
                raise ValueError(f"{name}: must be a C-contiguous, writeable array of 64-bit numbers")
            row[0] = array.ctypes.data
            row[1 : 1 + array.ndim] = array.shape
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "address", table.ctypes.data)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by the arrays: addresses mean nothing elsewhere."""
        return State, tuple(array for _, array in self.arrays())

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield the name and the array of every field, in order."""
        for name in NAMES:
            yield name, getattr(self, name)


NAMES = tuple(entry.name for entry in fields(State) if entry.init)
WORDS = 3


# Columns of `scalars`.
(
    BLOCK_SIZE,
    BUDGET,
    MAX_BATCH,
    WATERMARK,
    KV_BYTES,
    BANDWIDTH,
    LATENCY_S,
    STALL_S,
    DISPATCH_RULE,
    HOLD,
    EVICT_BY_VOLUME,
    FIRST_COME,
    SEED,
    SIGMA_START,
    SIGMA_END,
    SIGMA_TOKENS,
    HAS_PREDICTION,
    AGE_CREDIT,
    NEXT_MISS_S,
    NOW,
    LONGEST,
    PREFILL_RESUMES,
    FIRST_AT_PREFILL,
    RESIDUAL_LIFE,
    ENDED_BEFORE,
    ASK_AT,  # when a policy is to be asked in Python (asking.py); infinite: not before something happens
    SCALARS,
) = range(27)


def allocate(requests: int, decode: int, prefill: int, slots: int, block_size: int, quantiles: int = 3) -> State:
    """Make an empty state; `build` in cluster.py fills in the inputs."""

    def ints(*shape: int, value: int = 0) -> I8:
        return np.full(shape, value, np.int64)

    def floats(*shape: int, value: float = 0.0) -> F8:
        return np.full(shape, value, np.float64)

    leaves = 1
    while leaves < decode + prefill:
        leaves *= 2
    return State(
        arrival=floats(requests),
        prompt=ints(requests),
        output=ints(requests),
        status=ints(requests),
        place=ints(requests, value=NOBODY),
        prefill_place=ints(requests, value=NOBODY),
        generated=ints(requests),
        computed=ints(requests),
        slot=ints(requests, value=NOBODY),
        first_token=floats(requests, value=np.nan),
        finish=floats(requests, value=np.nan),
        blocks=ints(requests),
        follow=ints(requests, value=NOBODY),
        preempted=ints(requests),
        moved=ints(requests),
        target=ints(requests, value=NOBODY),
        moving=ints(requests),
        reserved=ints(requests),
        sequence=ints(requests),
        last_move=floats(requests, value=-np.inf),
        suspended_list=ints(requests),
        waits_since=floats(requests),
        eviction_key=floats(requests),
        queue_key=floats(requests),
        rank=ints(requests),
        missed=ints(requests),
        ttft=floats(requests, value=np.inf),
        tpot=floats(requests, value=np.inf),
        gap=floats(requests, value=np.inf),
        outside=ints(requests),
        movable=ints(requests),
        seen_tokens=ints(requests),
        seen_generated=ints(requests),
        seen_remaining=floats(requests, quantiles),
        silent_since=floats(requests, value=np.nan),
        kv_since=floats(requests),
        longest_gap=floats(requests),
        error_own=floats(requests),
        error_fresh=floats(requests),
        error_epoch=ints(requests),
        ended_lately=ints(REMEMBERED),
        ended_sorted=ints(REMEMBERED),
        time=floats(decode),
        step=ints(decode),
        planned=ints(decode),
        batch=ints(decode),
        resident=ints(decode),
        free=ints(decode),
        total_blocks=ints(decode),
        closed=ints(decode),
        head=ints(decode, value=NOBODY),
        tail=ints(decode, value=NOBODY),
        waiting_count=ints(decode),
        waiting_tokens=ints(decode),
        inbound_count=ints(decode),
        promised=ints(decode),
        prefilling=ints(decode),
        ready_count=ints(decode),
        ingress_free=floats(decode),
        egress_free=floats(decode),
        law=floats(decode, 5),
        slot_request=ints(decode, slots, value=NOBODY),
        slot_finish=ints(decode, slots),
        prefilling_list=ints(decode, slots, value=NOBODY),
        ready_list=ints(decode, slots, value=NOBODY),
        leaving_list=ints(decode, slots, value=NOBODY),
        leaving_count=ints(decode),
        arriving_list=ints(decode, slots, value=NOBODY),
        arriving_count=ints(decode),
        phase=ints(decode, block_size),
        expected=floats(decode, len(GRID)),
        variance=floats(decode, len(GRID)),
        row_request=ints(decode, slots, value=NOBODY),
        row_count=ints(decode),
        grid=GRID.astype(np.float64),
        forecast_time=floats(decode, value=-np.inf),
        prefill_head=ints(prefill, value=NOBODY),
        prefill_tail=ints(prefill, value=NOBODY),
        prefill_current=ints(prefill, value=NOBODY),
        prefill_backlog=ints(prefill),
        prefill_free=ints(prefill),
        prefill_egress_free=floats(prefill),
        prefill_law=floats(prefill, 5),
        tree=floats(2 * leaves, value=np.inf),
        heap_keys=floats(requests + 1),
        heap_items=ints(requests + 1),
        order=ints(requests + 1),
        by_age=ints(requests + 1),
        counters=ints(COUNTERS),
        scalars=floats(SCALARS),
        knobs=floats(len(Knobs._fields)),
    )
