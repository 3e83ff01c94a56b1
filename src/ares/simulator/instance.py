"""One decode instance: vLLM's continuous batching between two events.

At the start of a step the instance removes requests that have ended, adds those whose KV has arrived, gives every
decoding request the block that it needs (where none is free the newest request is preempted, to be recomputed, as in
vLLM v1), continues prompts in chunks, and starts waiting requests in order. Between such steps nothing changes but
lengths, so time advances in one jump.
"""

import numpy as np

from ares.policy.admission.state import SUSPENDED
from ares.simulator.block_cache import cached_tokens, enter_decode, evict_for_decode, leave_decode
from ares.simulator.blocks import (
    blocks_for,
    blocks_taken,
    enter_slot,
    leave_slot,
    phase_of,
    record_token,
    steps_until_full,
    tokens_at,
    unallocated_tokens,
)
from ares.simulator.heaps import compiled, inlined, tree_set
from ares.simulator.prediction import record_progress
from ares.simulator.preemption import allocate_step_blocks, choose_victim, preempt
from ares.simulator.queues import record_finish, schedule_event, start_pull, take_first
from ares.simulator.state import (
    DECODING,
    HANDOVER,
    HANDOVER_DONE,
    MIGRATING,
    NONE,
    NOT_LEAVING,
    PER_PREFILL_CONTEXT_S,
    PER_PREFILL_S,
    RECOMPUTING,
    SUSPENDING,
    State,
)
from ares.simulator.step_time import steps_by, steps_time


@compiled
def advance_to(state: State, instance: int, moment: float) -> None:
    """Bring an instance to the step that runs at `moment`, at most to the last one before its next event."""
    done = min(steps_by(state, instance, moment), state.planned[instance] - 1)
    if done <= 0:
        return
    state.time[instance] += steps_time(state, instance, done)
    state.free[instance] -= blocks_taken(state, instance, done)
    state.resident[instance] += done * state.batch[instance]
    state.step[instance] += done
    state.planned[instance] -= done


@inlined
def replan(state: State, instance: int) -> None:
    """Plan fewer steps where the free blocks of an instance run out earlier than planned; call `advance_to` first."""
    if state.planned[instance] > 1:
        state.planned[instance] = min(state.planned[instance], steps_until_full(state, instance))
        tree_set(state.tree, instance, state.time[instance] + steps_time(state, instance, state.planned[instance]))


@compiled
def schedule_step(state: State, instance: int, moment: float) -> None:
    """Run the scheduler of an instance when its current step ends, or now if it is idle."""
    if state.planned[instance] == 1:
        return
    following = moment
    if state.planned[instance] == 0:
        state.time[instance] = moment
    else:
        advance_to(state, instance, moment)
        state.planned[instance] = 1
        following = state.time[instance] + steps_time(state, instance, 1)
    tree_set(state.tree, instance, following)


@compiled
def release_reservation(state: State, request: int, moment: float) -> None:
    """Free the blocks that a cancelled move had reserved at its target, exactly once (I5)."""
    target = state.target[request]
    if target == NONE:
        state.current.block_errors += 1
        return
    advance_to(state, target, moment)
    state.free[target] += state.reserved[request]
    state.promised[target] -= state.reserved[request]
    state.reserved[request] = 0
    state.target[request] = NONE
    state.inbound_count[target] -= 1
    state.current.migrations_cancelled += 1
    schedule_step(state, target, moment)


@inlined
def start_step(state: State, instance: int, moment: float) -> None:
    """Start the next step: what vLLM's scheduler does between two forward passes."""
    planned = state.planned[instance]
    if planned > 0:
        state.free[instance] -= blocks_taken(state, instance, planned - 1)
        state.resident[instance] += planned * state.batch[instance]
        state.step[instance] += planned
    state.time[instance] = moment
    state.planned[instance] = 0
    _finish_done(state, instance, moment)
    _hand_over_or_suspend(state, instance, moment)
    _promote_prefilled(state, instance, moment)
    joined = _join_ready(state, instance) > 0
    oom = allocate_step_blocks(state, instance)
    budget = state.parameters.token_budget - state.batch[instance]
    budget, prompt_time = _continue_prompts(state, instance, budget)
    evict_for_decode(state, instance)
    if not oom:
        prompt_time += _start_waiting(state, instance, moment, budget)
        evict_for_decode(state, instance)
    retry = oom and state.head[instance] != NONE  # a step that preempts admits no request; the next one may
    _plan(state, instance, moment, joined, prompt_time, retry)


@inlined
def _finish_done(state: State, instance: int, moment: float) -> None:
    step = state.step[instance]
    at = state.batch[instance] - 1
    while at >= 0:
        if state.slot_finish[instance, at] <= step:
            request = leave_slot(state, instance, at)
            record_finish(state, request, moment)
        at -= 1


@inlined
def _hand_over_or_suspend(state: State, instance: int, moment: float) -> None:
    """Start the hand-over of requests whose KV is copied, and suspend those that are to be suspended."""
    for index in range(state.leaving_count[instance]):
        request = state.leaving_list[instance, index]
        if state.target[request] == NONE:  # to be suspended, not migrated
            if state.status[request] == DECODING and state.leaving[request] == SUSPENDING:
                _suspend(state, instance, request, moment)
            continue
        if state.status[request] == DECODING and state.leaving[request] == MIGRATING:
            state.leaving[request] = NOT_LEAVING
            leave_slot(state, instance, state.slot[request])
            state.status[request] = HANDOVER
            schedule_event(state, moment + state.parameters.stall_s, request, HANDOVER_DONE)
        else:
            release_reservation(state, request, moment)
    state.leaving_count[instance] = 0


@inlined
def _suspend(state: State, instance: int, request: int, moment: float) -> None:
    state.leaving[request] = NOT_LEAVING
    leave_slot(state, instance, state.slot[request])
    record_suspension(state, request, moment)


@compiled
def record_suspension(state: State, request: int, moment: float) -> None:
    """Record that a request has left its instance without its KV, and waits to be admitted again."""
    state.current.suspensions += 1
    state.status[request] = SUSPENDED
    state.decode_instance[request] = NONE
    state.waiting_since[request] = moment
    record_progress(state, request, state.generated[request])
    state.suspended_list[state.current.suspended_count] = request
    state.current.suspended_count += 1


@inlined
def _promote_prefilled(state: State, instance: int, moment: float) -> None:
    """Start to decode requests whose last prompt chunk has run, which produced a token."""
    kept = 0
    for index in range(state.prefilling[instance]):
        request = state.prefilling_list[instance, index]
        if state.computed[request] < state.prompt[request] + state.generated[request]:
            state.prefilling_list[instance, kept] = request
            kept += 1
            continue
        state.unallocated_tokens[instance] -= unallocated_tokens(state, request)
        enter_decode(state, request, instance, state.prompt[request])
        state.generated[request] += 1
        if np.isnan(state.first_token[request]):
            state.first_token[request] = moment
        record_token(state, request, moment)
        if state.generated[request] >= state.output[request]:
            state.free[instance] += state.blocks[request]
            leave_decode(state, request, instance)
            state.blocks[request] = 0
            record_finish(state, request, moment)
            continue
        state.status[request] = DECODING
        state.blocks[request] = 0
        finish = state.step[instance] + state.output[request] - state.generated[request]
        enter_slot(state, instance, request, finish)
    state.prefilling[instance] = kept


@inlined
def _join_ready(state: State, instance: int) -> int:
    """Add the requests whose KV has arrived to the batch; return how many."""
    count = state.ready_count[instance]
    for index in range(count):
        request = state.ready_list[instance, index]
        finish = state.step[instance] + state.output[request] - state.generated[request]
        need = blocks_for(state, tokens_at(state, request, finish, state.step[instance]) - 1)
        # A move reserved blocks for an estimate of the length at its end: correct the difference.
        state.free[instance] += state.blocks[request] - need
        state.blocks[request] = 0
        state.status[request] = DECODING
        state.sequence[request] = state.current.next_sequence
        state.current.next_sequence += 1
        enter_slot(state, instance, request, finish)
    state.ready_count[instance] = 0
    return int(count)


@inlined
def _chunk_time(state: State, instance: int, start: int, chunk: int) -> float:
    model = state.step_model[instance]
    return float(model[PER_PREFILL_S] * chunk + model[PER_PREFILL_CONTEXT_S] * chunk * (start + chunk / 2.0))


@inlined
def _continue_prompts(state: State, instance: int, budget: int) -> tuple[int, float]:
    """Compute the next chunk of each prompt in progress; return the budget left and the time of the chunks."""
    size = state.parameters.block_size
    time = 0.0
    index = 0
    while index < state.prefilling[instance] and budget > 0:
        request = state.prefilling_list[instance, index]
        start = state.computed[request]
        chunk = min(state.prompt[request] + state.generated[request] - start, budget)
        need = blocks_for(state, start + chunk) - state.blocks[request]
        fits = True
        while need > state.free[instance]:
            chosen = choose_victim(state, instance)
            state.current.oom_events += 1
            if chosen < state.batch[instance]:
                other = state.slot_request[instance, chosen]
                if phase_of(state, other, state.slot_finish[instance, chosen]) == state.step[instance] % size:
                    state.free[instance] += 1  # the block that this step gave it goes back too
            if preempt(state, instance, chosen) == request:
                fits = False
                break
        if not fits:
            continue
        # A preempted prompt ahead of this one in the list has shifted it by one place.
        while index >= state.prefilling[instance] or state.prefilling_list[instance, index] != request:
            index -= 1
        state.free[instance] -= need
        state.blocks[request] += need
        state.unallocated_tokens[instance] -= need * size
        state.computed[request] = start + chunk
        budget -= chunk
        time += _chunk_time(state, instance, start, chunk)
        index += 1
    return budget, time


@inlined
def _start_waiting(state: State, instance: int, moment: float, budget: int) -> float:
    """Start waiting requests in order while slots, blocks and token budget last; return the seconds of new chunks.

    As in vLLM's scheduler: the KV of a prefilled request is pulled, the prompt of any other is computed here.
    """
    time = 0.0
    while state.head[instance] != NONE:
        running = state.batch[instance] + state.prefilling[instance]
        arriving = state.inbound_count[instance] + state.ready_count[instance]
        if running + arriving >= state.parameters.max_batch:
            break
        request = state.head[instance]
        available = state.free[instance] - (state.parameters.watermark_blocks if running + arriving > 0 else 0)
        tokens = state.prompt[request] + state.generated[request]
        # The whole sequence must fit, not its first chunk alone: vLLM's scheduler_reserve_full_isl, on by default.
        if blocks_for(state, tokens) > available:
            break
        if state.prefill_instance[request] != NONE:
            need = blocks_for(state, tokens - 1)
            take_first(state, instance)
            state.free[instance] -= need
            state.blocks[request] = need
            cached = cached_tokens(state, instance, request)
            enter_decode(state, request, instance, state.prompt[request])
            start_pull(state, instance, request, cached, moment)
            continue
        cached = cached_tokens(state, instance, request)
        chunk = min(tokens - cached, budget)
        need = blocks_for(state, cached + chunk)
        if chunk <= 0:
            break
        take_first(state, instance)
        state.free[instance] -= need
        state.blocks[request] = need
        state.unallocated_tokens[instance] += unallocated_tokens(state, request)
        state.status[request] = RECOMPUTING
        enter_decode(state, request, instance, cached)
        state.computed[request] = cached + chunk
        state.sequence[request] = state.current.next_sequence
        state.current.next_sequence += 1
        state.prefilling_list[instance, state.prefilling[instance]] = request
        state.prefilling[instance] += 1
        budget -= chunk
        time += _chunk_time(state, instance, cached, chunk)
    return time


@inlined
def _plan(state: State, instance: int, moment: float, joined: bool, prompt_time: float, retry: bool) -> None:
    """Plan the steps until one needs the scheduler again, and record the first tokens of this one."""
    batch = state.batch[instance]
    if batch == 0 and state.prefilling[instance] == 0:
        state.planned[instance] = 0
        tree_set(state.tree, instance, np.inf)
        return
    if retry or state.prefilling[instance] > 0:
        steps = 1
    else:
        steps = steps_until_full(state, instance)
        step = state.step[instance]
        for at in range(batch):
            steps = min(steps, state.slot_finish[instance, at] - step)
    state.planned[instance] = steps
    one = moment + steps_time(state, instance, 1) + prompt_time
    tree_set(state.tree, instance, one if steps == 1 else moment + steps_time(state, instance, steps))
    if joined:  # requests that have joined may be in any slot: a preemption moves the last one
        for at in range(batch):
            request = state.slot_request[instance, at]
            if np.isnan(state.first_token[request]):
                state.first_token[request] = one
            record_token(state, request, one)
