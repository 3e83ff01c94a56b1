"""Admission inside the event loop: the policy's own loop over the arrays of the state, and what follows from it."""

import numpy as np

from ares.policy.admission import loop
from ares.policy.admission.state import (
    ADMIT,
    INSIDE,
    RESUME,
    SUSPEND,
    SUSPENDED,
    WAITING,
    Horizon,
    Instances,
    Knobs,
    Queue,
    Requests,
)
from ares.policy.transfer import KEPT_S
from ares.simulator.decisions import STALE_S, enter, place, refresh, rows_at
from ares.simulator.heaps import compiled
from ares.simulator.instance import note_suspended, request_step
from ares.simulator.prediction import WEIGHTS, see, weigh
from ares.simulator.prefill import pinned_tokens, start_prefill, to_prefill
from ares.simulator.queues import take_out
from ares.simulator.state import (
    AGE_CREDIT,
    AGE_HEAD,
    AGE_TAIL,
    ASK_AT,
    AT_ONCE,
    BASE_S,
    BLOCK_SIZE,
    BY_ASKING,
    BY_LOOP,
    CHANGES,
    FINISHED_COUNT,
    FIRST_AT_PREFILL,
    HELD,
    HOLD,
    MIGRATIONS,
    NEXT_MISS_S,
    NOBODY,
    PER_REQUEST_S,
    PER_RESIDENT_S,
    PREEMPTIONS,
    PREFILL_RESUMES,
    QUEUE_SIZE,
    SUSPENDED_COUNT,
    SUSPENSIONS,
    State,
)

_DECISIONS = 64  # decisions of one call of the policy's loop

admit = loop.admit
insert_in_order = loop.insert_in_order


@compiled
def hand_out(state: State, request: int, moment: float) -> None:
    """Dispatch a request that left prefill, or hold it for admission."""
    see(state, request, state.generated[request])
    weigh(state, request)
    if state.scalars[HOLD] == AT_ONCE:
        place(state, request, moment)
        return
    hold(state, request, moment)
    if state.scalars[HOLD] == BY_ASKING:
        state.scalars[ASK_AT] = moment
        return
    admit_held(state, moment)


@compiled
def look_again(state: State, instance: int, moment: float) -> None:
    """Let in who is outside, after the start of a step of an instance that may have made room."""
    if state.counters[QUEUE_SIZE] + state.counters[SUSPENDED_COUNT] == 0:
        return
    if state.scalars[HOLD] == BY_LOOP:
        refresh(state, instance, moment)
        admit_held(state, moment)
        return
    counters = state.counters
    changes = counters[FINISHED_COUNT] + counters[MIGRATIONS] + counters[PREEMPTIONS] + counters[SUSPENSIONS]
    if changes != counters[CHANGES]:
        counters[CHANGES] = changes
        state.scalars[ASK_AT] = moment


@compiled
def hold(state: State, request: int, moment: float) -> None:
    """Queue a request for admission; its KV stays at its prefill instance."""
    state.kv_since[request] = moment
    state.status[request] = HELD
    state.outside[request] = WAITING
    state.waits_since[request] = state.arrival[request]
    insert_in_order(state.order, state.counters[QUEUE_SIZE], request, state.rank, state.missed, state.queue_key)
    state.counters[QUEUE_SIZE] += 1
    state.by_age[state.counters[AGE_TAIL]] = request
    state.counters[AGE_TAIL] += 1
    state.scalars[NEXT_MISS_S] = min(state.scalars[NEXT_MISS_S], state.arrival[request] + state.ttft[request])


@compiled
def refresh_and_admit(state: State, moment: float) -> None:
    """Forecast every instance anew and admit what fits."""
    if state.scalars[HOLD] == BY_LOOP and state.counters[QUEUE_SIZE] + state.counters[SUSPENDED_COUNT] > 0:
        for instance in range(len(state.time)):
            refresh(state, instance, moment)
        admit_held(state, moment)


@compiled
def admit_held(state: State, moment: float) -> None:
    """Let requests into decode until the next one fits nowhere."""
    for instance in range(len(state.time)):
        if moment - state.forecast_time[instance] > STALE_S:
            refresh(state, instance, moment)
    knobs = Knobs(
        state.knobs[0],
        state.knobs[1],
        state.knobs[2],
        state.knobs[3],
        state.knobs[4],
        state.knobs[5],
        state.knobs[6],
        state.knobs[7],
        state.knobs[8],
        state.knobs[9],
        state.knobs[10],
        state.knobs[11],
        state.knobs[12],
    )
    if knobs.suspends > 0.0:
        _note_missed(state, moment)
    horizon = Horizon(state.grid, WEIGHTS, int(state.scalars[BLOCK_SIZE]))
    load = np.empty(len(state.time), np.int64)
    for instance in range(len(load)):
        load[instance] = rows_at(state, instance)
    instances = Instances(
        state.expected,
        state.variance,
        state.total_blocks * int(state.scalars[BLOCK_SIZE]),
        state.closed,
        load,
        state.law[:, BASE_S].copy(),
        state.law[:, PER_REQUEST_S].copy(),
        state.law[:, PER_RESIDENT_S].copy(),
        state.row_request,
        state.row_count,
    )
    requests = Requests(
        state.seen_tokens,
        state.seen_remaining,
        state.seen_generated,
        state.arrival,
        state.first_token,
        state.waits_since,
        state.ttft,
        state.tpot,
        state.gap,
        state.longest_gap,
        state.rank,
        state.outside,
        state.movable,
        np.empty((0, 0), np.int64),
    )
    decided, numbers = np.empty((_DECISIONS, 4), np.int64), np.empty((_DECISIONS, 3))
    while True:
        head, tail = state.counters[AGE_HEAD], state.counters[AGE_TAIL]
        queue = Queue(
            state.order[: state.counters[QUEUE_SIZE]],
            state.by_age[head:tail],
            state.suspended_list[: state.counters[SUSPENDED_COUNT]],
        )
        made, state.scalars[AGE_CREDIT] = admit(
            moment, state.scalars[AGE_CREDIT], instances, requests, queue, horizon, knobs, decided, numbers
        )
        for index in range(made):
            _carry_out(state, decided[index, 0], decided[index, 1], decided[index, 2], moment)
        _forget_admitted(state)
        if made + 2 <= _DECISIONS:
            return


@compiled
def _note_missed(state: State, moment: float) -> None:
    """Put waiting requests that have just missed their first token behind all that have not."""
    if moment < state.scalars[NEXT_MISS_S]:
        return
    following = np.inf
    for at in range(state.counters[AGE_HEAD], state.counters[AGE_TAIL]):
        request = state.by_age[at]
        if state.outside[request] != WAITING or state.missed[request] != 0:
            continue
        if not moment - state.arrival[request] > state.ttft[request]:
            following = min(following, state.arrival[request] + state.ttft[request])
            continue
        size = state.counters[QUEUE_SIZE]
        place = 0
        while state.order[place] != request:
            place += 1
        for index in range(place + 1, size):
            state.order[index - 1] = state.order[index]
        state.missed[request] = 1
        insert_in_order(state.order, size - 1, request, state.rank, state.missed, state.queue_key)
    state.scalars[NEXT_MISS_S] = following


@compiled
def _forget_admitted(state: State) -> None:
    """Take out of the queue what has been admitted."""
    kept = 0
    for index in range(state.counters[QUEUE_SIZE]):
        request = state.order[index]
        if state.outside[request] == WAITING:
            state.order[kept] = request
            kept += 1
    state.counters[QUEUE_SIZE] = kept
    head, tail = state.counters[AGE_HEAD], state.counters[AGE_TAIL]
    while head < tail and state.outside[state.by_age[head]] != WAITING:
        head += 1
    state.counters[AGE_HEAD] = head
    kept = 0
    for index in range(state.counters[SUSPENDED_COUNT]):
        request = state.suspended_list[index]
        if state.outside[request] == SUSPENDED:
            state.suspended_list[kept] = request
            kept += 1
    state.counters[SUSPENDED_COUNT] = kept


@compiled
def _carry_out(state: State, kind: int, request: int, instance: int, moment: float) -> None:
    if kind == ADMIT and len(state.prefill_free) > 0 and state.prefill_place[request] == NOBODY:  # its KV is gone
        state.place[request] = instance
        to_prefill(state, request, moment)
    elif kind == ADMIT:
        give_first(state, request, moment)
        enter(state, request, instance, moment)
    elif kind == RESUME:
        state.computed[request] = 0
        if state.scalars[PREFILL_RESUMES] == 0.0:
            enter(state, request, instance, moment)
        else:
            # On a prefill instance, where one is large enough: a decode instance would hold up its whole batch.
            state.place[request] = instance
            to_prefill(state, request, moment)
    else:
        begin_suspension(state, request, moment)


@compiled
def carry_out_asked(state: State, kind: int, request: int, instance: int, moment: float) -> None:
    """Carry out what a policy has decided in Python: `kind` as in policy/admission/state.py."""
    if kind != SUSPEND:
        state.outside[request] = INSIDE
    _carry_out(state, kind, request, instance, moment)
    _forget_admitted(state)


@compiled
def begin_suspension(state: State, request: int, moment: float) -> None:
    """Cut a request at the next step of its instance, to let its KV go (instance.py)."""
    instance = state.place[request]
    if state.slot[request] == NOBODY or state.moving[request] != 0 or state.target[request] != NOBODY:
        return  # it has ended, or left, since it was seen
    state.moving[request] = 2
    state.movable[request] = 0
    state.leaving_list[instance, state.leaving_count[instance]] = request
    state.leaving_count[instance] += 1
    request_step(state, instance, moment)


@compiled
def withdraw_preempted(state: State, moment: float) -> None:
    """Suspend what instances have preempted: it runs again where there is room, not where there was none."""
    for instance in range(len(state.time)):
        request = state.head[instance]
        while request != NOBODY:
            following = state.follow[request]
            if state.preempted[request] > 0 and state.prefill_place[request] == NOBODY:
                take_out(state, instance, request)
                note_suspended(state, request, moment)
            request = following


@compiled
def let_kv_go(state: State, moment: float) -> None:
    """Free the KV of requests that have waited for admission for so long that no instance will keep it.

    As the gateway of ARES does: they wait on, and are prefilled again once they are admitted.
    """
    if state.scalars[HOLD] == 0.0:
        return
    for index in range(state.counters[QUEUE_SIZE]):
        request = state.order[index]
        prefill = state.prefill_place[request]
        if prefill != NOBODY and moment - state.kv_since[request] >= KEPT_S:
            state.prefill_free[prefill] += pinned_tokens(state, request)
            state.prefill_place[request] = NOBODY
            start_prefill(state, prefill, moment)


@compiled
def give_first(state: State, request: int, moment: float) -> None:
    """Give the token of the prefill to the client, where that is how it is done and it has none yet."""
    if state.scalars[FIRST_AT_PREFILL] > 0.0 and np.isnan(state.first_token[request]):
        state.first_token[request] = moment
        state.silent_since[request] = moment  # until decode brings the next one
