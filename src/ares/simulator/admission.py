"""Admission inside the event loop: the policy's own loop over the arrays of the state, and what its decisions do."""

import numpy as np

from ares.policy.admission import PREFILLED_KV_KEPT_S, loop
from ares.policy.admission.state import (
    ADMIT,
    ADMITTED,
    RESUME,
    SUSPEND,
    SUSPENDED,
    WAITING,
    Horizon,
    Instances,
    Queue,
    Requests,
)
from ares.simulator.block_cache import cached_tokens, leave_prefill
from ares.simulator.decisions import dispatch, enqueue, refresh_stale, rows_at
from ares.simulator.heaps import compiled, inlined
from ares.simulator.instance import record_suspension, schedule_step
from ares.simulator.prediction import WEIGHTS, record_progress, set_queue_keys
from ares.simulator.prefill import pinned_tokens, queue_for_prefill, start_prefill
from ares.simulator.queues import remove_waiting
from ares.simulator.state import (
    BASE_S,
    BY_COMPILED_LOOP,
    BY_PYTHON_POLICY,
    IMMEDIATE,
    NONE,
    NOT_LEAVING,
    PER_REQUEST_S,
    PER_RESIDENT_S,
    SUSPENDING,
    State,
)

_DECISIONS = 64  # decisions of one call of the policy's loop
_LOOKED_UP = 64  # how many of the next waiting requests are looked up in prefix caches again, period after period

admit = loop.admit
insert_in_order = loop.insert_in_order


@inlined
def dispatch_or_wait(state: State, request: int, moment: float) -> None:
    """Dispatch a request that left prefill, or queue it for admission."""
    record_progress(state, request, state.generated[request])
    set_queue_keys(state, request)
    if state.parameters.admission_mode == IMMEDIATE:
        dispatch(state, request, moment)
        return
    wait_for_admission(state, request, moment)
    if state.parameters.admission_mode == BY_PYTHON_POLICY:
        state.current.call_policy_at_s = moment
        return
    state.current.admission_due = 1


@inlined
def admit_after_step(state: State, instance: int, moment: float) -> None:
    """Admit requests after the start of a step of an instance, which may have made room."""
    if state.current.queue_size + state.current.suspended_count == 0:
        return
    if state.parameters.admission_mode == BY_COMPILED_LOOP:
        state.forecast_time[instance] = -np.inf
        state.current.admission_due = 1
        return
    current = state.current
    changes = current.finished + current.migrations + current.preemptions + current.suspensions
    if changes != current.changes_seen:
        current.changes_seen = changes
        state.current.call_policy_at_s = moment


@inlined
def wait_for_admission(state: State, request: int, moment: float) -> None:
    """Queue a request for admission; its KV stays at its prefill instance."""
    state.kv_since[request] = moment
    state.status[request] = WAITING
    state.waiting_since[request] = state.arrival[request]
    insert_in_order(state.order, state.current.queue_size, request, state.rank, state.ttft_missed, state.queue_key)
    state.current.queue_size += 1
    look_up_cached(state, request)
    state.by_age[state.current.by_age_end] = request
    state.current.by_age_end += 1
    state.current.next_ttft_miss_s = min(state.current.next_ttft_miss_s, state.arrival[request] + state.ttft[request])


def refresh_and_admit(state: State, moment: float) -> None:
    """Forecast every instance again and admit what fits."""
    # Not compiled: the compiler would go through all of `admit_waiting` once more.
    if (
        state.parameters.admission_mode == BY_COMPILED_LOOP
        and state.current.queue_size + state.current.suspended_count > 0
    ):
        state.forecast_time[:] = -np.inf
        if len(state.cached_at) > 0:
            _look_up_next(state)
        admit_waiting(state, moment)


@compiled
def _look_up_next(state: State) -> None:
    """Look up what decode instances have cached of the next waiting requests."""
    for index in range(min(state.current.queue_size, _LOOKED_UP)):
        look_up_cached(state, state.order[index])


@inlined
def look_up_cached(state: State, request: int) -> None:
    """Look up what decode instances have cached of a request, where admission weighs it."""
    if len(state.cached_at) > 0:
        for instance in range(len(state.time)):
            state.cached_at[request, instance] = cached_tokens(state, instance, request)


@compiled
def admit_waiting(state: State, moment: float) -> None:
    """Admit requests to decode until the next one fits nowhere."""
    refresh_stale(state, moment)
    if state.admission_settings.suspends > 0.0:
        _move_late_requests_back(state, moment)
    horizon = Horizon(state.grid, WEIGHTS, state.parameters.block_size)
    load = np.empty(len(state.time), np.int64)
    for instance in range(len(load)):
        load[instance] = rows_at(state, instance)
    instances = Instances(
        state.expected,
        state.variance,
        state.total_blocks * state.parameters.block_size,
        state.closed,
        load,
        state.step_model[:, BASE_S].copy(),
        state.step_model[:, PER_REQUEST_S].copy(),
        state.step_model[:, PER_RESIDENT_S].copy(),
        state.row_request,
        state.row_count,
    )
    requests = Requests(
        state.observed_tokens,
        state.observed_remaining,
        state.observed_generated,
        state.arrival,
        state.first_token,
        state.waiting_since,
        state.ttft,
        state.tpot,
        state.gap,
        state.longest_gap,
        state.rank,
        state.status,
        state.suspendable,
        np.empty((0, 0), np.int64),
        state.cached_at,
    )
    decided, numbers = np.empty((_DECISIONS, 4), np.int64), np.empty((_DECISIONS, 3))
    while True:
        head, tail = state.current.by_age_start, state.current.by_age_end
        queue = Queue(
            state.order[: state.current.queue_size],
            state.by_age[head:tail],
            state.suspended_list[: state.current.suspended_count],
        )
        made, state.current.age_credit = admit(
            moment,
            state.current.age_credit,
            instances,
            requests,
            queue,
            horizon,
            state.admission_settings,
            decided,
            numbers,
        )
        for index in range(made):
            _carry_out(state, decided[index, 0], decided[index, 1], decided[index, 2], moment)
        _remove_admitted(state)
        if made + 2 <= _DECISIONS:
            return


@inlined
def _move_late_requests_back(state: State, moment: float) -> None:
    """Move waiting requests that have just missed their TTFT behind all that have not."""
    if moment < state.current.next_ttft_miss_s:
        return
    following = np.inf
    for at in range(state.current.by_age_start, state.current.by_age_end):
        request = state.by_age[at]
        if state.status[request] != WAITING or state.ttft_missed[request] != 0:
            continue
        if not moment - state.arrival[request] > state.ttft[request]:
            following = min(following, state.arrival[request] + state.ttft[request])
            continue
        size = state.current.queue_size
        place = 0
        while state.order[place] != request:
            place += 1
        for index in range(place + 1, size):
            state.order[index - 1] = state.order[index]
        state.ttft_missed[request] = 1
        insert_in_order(state.order, size - 1, request, state.rank, state.ttft_missed, state.queue_key)
    state.current.next_ttft_miss_s = following


@inlined
def _remove_admitted(state: State) -> None:
    """Remove admitted requests from the queue."""
    kept = 0
    for index in range(state.current.queue_size):
        request = state.order[index]
        if state.status[request] == WAITING:
            state.order[kept] = request
            kept += 1
    state.current.queue_size = kept
    head, tail = state.current.by_age_start, state.current.by_age_end
    while head < tail and state.status[state.by_age[head]] != WAITING:
        head += 1
    state.current.by_age_start = head
    kept = 0
    for index in range(state.current.suspended_count):
        request = state.suspended_list[index]
        if state.status[request] == SUSPENDED:
            state.suspended_list[kept] = request
            kept += 1
    state.current.suspended_count = kept


@inlined
def _carry_out(state: State, kind: int, request: int, instance: int, moment: float) -> None:
    """Carry out one decision of either kind of policy: `kind` as in policy/admission/state.py."""
    if kind == ADMIT and len(state.prefill_free) > 0 and state.prefill_instance[request] == NONE:  # its KV is gone
        state.decode_instance[request] = instance
        queue_for_prefill(state, request, moment)
    elif kind == ADMIT:
        deliver_first_token(state, request, moment)
        enqueue(state, request, instance, moment)
    elif kind == RESUME:
        state.computed[request] = 0
        if not state.parameters.prefill_resumes:
            enqueue(state, request, instance, moment)
        else:
            # On a prefill instance, where one is large enough: a decode instance would delay its whole batch.
            state.decode_instance[request] = instance
            queue_for_prefill(state, request, moment)
    else:
        begin_suspension(state, request, moment)


@compiled
def carry_out_decision(state: State, kind: int, request: int, instance: int, moment: float) -> None:
    """Carry out a decision of a policy in Python: `kind` as in policy/admission/state.py."""
    if kind != SUSPEND:
        state.status[request] = ADMITTED
    _carry_out(state, kind, request, instance, moment)
    _remove_admitted(state)


@compiled
def begin_suspension(state: State, request: int, moment: float) -> None:
    """Suspend a request at the next step of its instance, which frees its KV (instance.py)."""
    instance = state.decode_instance[request]
    if state.slot[request] == NONE or state.leaving[request] != NOT_LEAVING or state.target[request] != NONE:
        return  # it has ended, or is leaving, since it was observed
    state.leaving[request] = SUSPENDING
    state.suspendable[request] = 0
    state.leaving_list[instance, state.leaving_count[instance]] = request
    state.leaving_count[instance] += 1
    schedule_step(state, instance, moment)


@compiled
def suspend_preempted(state: State, moment: float) -> None:
    """Suspend the requests that instances have preempted: they resume where there is room."""
    for instance in range(len(state.time)):
        request = state.head[instance]
        while request != NONE:
            following = state.next_request[request]
            if state.preempted[request] > 0 and state.prefill_instance[request] == NONE:
                remove_waiting(state, instance, request)
                record_suspension(state, request, moment)
            request = following


@compiled
def free_expired_kv(state: State, moment: float) -> None:
    """Free the KV of requests that have waited for admission for longer than an instance keeps it.

    As the gateway of ARES does: they keep waiting, and are prefilled again once they are admitted.
    """
    if state.parameters.admission_mode == IMMEDIATE:
        return
    for index in range(state.current.queue_size):
        request = state.order[index]
        prefill = state.prefill_instance[request]
        if prefill != NONE and moment - state.kv_since[request] >= PREFILLED_KV_KEPT_S:
            state.prefill_free[prefill] += pinned_tokens(state, request)
            leave_prefill(state, request, prefill)
            state.prefill_instance[request] = NONE
            start_prefill(state, prefill, moment)


@inlined
def deliver_first_token(state: State, request: int, moment: float) -> None:
    """Deliver the prefill's token to the client, where it comes from prefill and the client has none yet."""
    if state.parameters.first_at_prefill and np.isnan(state.first_token[request]):
        state.first_token[request] = moment
        state.paused_since[request] = moment  # until decode brings the next one
