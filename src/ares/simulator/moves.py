"""Migration: reserve at the target, copy while the source decodes, hand over, join; and how each is cancelled."""

from collections.abc import Sequence
from dataclasses import dataclass

from ares.policy import Cluster, MigrationDecision
from ares.policy.oom_avoidance import NO_TARGET, OomAction
from ares.simulator.admission import begin_suspension
from ares.simulator.block_cache import cached_tokens, enter_decode
from ares.simulator.blocks import blocks_for, tokens_at
from ares.simulator.decisions import dispatch_again
from ares.simulator.heaps import compiled, inlined
from ares.simulator.instance import advance_to, release_reservation, replan, schedule_step
from ares.simulator.queues import schedule_event, transfer_end
from ares.simulator.state import (
    COPY_DONE,
    DECODING,
    MIGRATING,
    NONE,
    NOT_LEAVING,
    State,
)
from ares.simulator.step_time import steps_time


@dataclass(frozen=True, slots=True)
class MoveRecord:
    """One migration that began, and why."""

    time_s: float
    request: int
    source: int
    target: int
    reason: str


def carry_out(
    state: State, cluster: Cluster, decisions: Sequence[OomAction | MigrationDecision], now: float
) -> list[MoveRecord]:
    """Begin the moves that their targets have room for, and suspend requests that fit nowhere.

    Parameters
    ----------
    state
        The simulated cluster.
    cluster
        What was decided on: decisions are indices into it.
    decisions
        Moves and suspensions, in this order.
    now
        Seconds.
    """
    begun: list[MoveRecord] = []
    for decision in decisions:
        request = int(cluster.requests[decision.request])
        if decision.target == NO_TARGET:
            begin_suspension(state, request, now)
        elif begin_move(state, request, decision.target, now):
            begun.append(MoveRecord(now, request, decision.source, decision.target, decision.reason))
    return begun


@compiled
def begin_move(state: State, request: int, target: int, moment: float) -> bool:
    """Reserve blocks at the target and start the copy; False where the target has no room for it (I6)."""
    source = state.decode_instance[request]
    busy = state.target[request] != NONE or state.leaving[request] != NOT_LEAVING
    if state.status[request] != DECODING or busy or source == target:
        return False
    occupied = state.batch[target] + state.prefilling[target] + state.inbound_count[target] + state.ready_count[target]
    advance_to(state, source, moment)
    advance_to(state, target, moment)
    tokens = tokens_at(state, request, state.slot_finish[source, state.slot[request]], state.step[source])
    # What the target has cached stays where it is, as in vLLM: only the rest is copied.
    copied = tokens - cached_tokens(state, target, request)
    end = transfer_end(state, state.egress_free[source], state.ingress_free[target], copied, moment)
    step = max(steps_time(state, source, 1), 1e-4)
    growth = int((end + state.parameters.latency_s + state.parameters.stall_s - moment) / step) + 4
    need = blocks_for(state, tokens + growth)
    refused = need > state.free[target] - state.parameters.watermark_blocks
    if refused or state.closed[target] != 0 or occupied >= state.parameters.max_batch:
        state.current.migrations_refused += 1
        return False
    state.free[target] -= need
    replan(state, target)
    state.inbound_count[target] += 1
    state.reserved[request] = need
    state.promised[target] += need
    state.target[request] = target
    state.leaving[request] = MIGRATING
    state.last_move[request] = moment
    state.egress_free[source] = end
    state.ingress_free[target] = end
    state.current.migrated_bytes += int(copied * state.parameters.kv_bytes_per_token)
    schedule_event(state, end + state.parameters.latency_s, request, COPY_DONE)
    return True


@inlined
def finish_copy(state: State, request: int, moment: float) -> None:
    """Stop the request at the source's next step, or free the reservation where it has ended or lost its KV (I5)."""
    if state.leaving[request] == MIGRATING and state.status[request] == DECODING:
        source = state.decode_instance[request]
        state.leaving_list[source, state.leaving_count[source]] = request
        state.leaving_count[source] += 1
        schedule_step(state, source, moment)
    else:
        release_reservation(state, request, moment)


@inlined
def finish_handover(state: State, request: int, moment: float) -> None:
    """Let the request join the target at its next step."""
    target = state.target[request]
    state.decode_instance[request] = target
    state.target[request] = NONE
    blocks = state.reserved[request]
    state.reserved[request] = 0
    state.promised[target] -= blocks
    state.inbound_count[target] -= 1
    if state.closed[target] != 0:  # failed meanwhile: resume elsewhere from the tokens
        state.free[target] += blocks
        state.computed[request] = 0
        dispatch_again(state, request, moment)
        return
    state.blocks[request] = blocks
    enter_decode(state, request, target, state.prompt[request])
    state.ready_list[target, state.ready_count[target]] = request
    state.ready_count[target] += 1
    state.moved[request] += 1
    state.current.migrations += 1
    schedule_step(state, target, moment)
