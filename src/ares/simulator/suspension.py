"""Suspending a long request for a waiting one, and resuming it, by the rules of `ares.policy.suspend`."""

import numpy as np
from numpy.typing import NDArray

from ares.policy import queue
from ares.policy import suspend as policy
from ares.policy.forecast import own_curve as plain_own_curve
from ares.simulator.compiled import compiled
from ares.simulator.instance import poke
from ares.simulator.law import steps_by
from ares.simulator.prediction import WEIGHTS, predict
from ares.simulator.state import (
    BLOCK_SIZE,
    FULL_STEP_S,
    LONGEST_SUSPENSION_S,
    NOBODY,
    SLO_TPOT_S,
    SLO_TTFT_S,
    SUSPEND_RATIO,
    SUSPENDED_COUNT,
    URGENT_S,
    State,
)

final_slack_s = compiled(policy.final_slack_s)
memory_time = compiled(queue.memory_time)
own_curve = compiled(plain_own_curve)

DEAD = -1e9


@compiled
def slack(state: State, request: int, generated: int, moment: float, quantiles: NDArray[np.float64]) -> float:
    """Return the seconds a request may stand still; `DEAD` where it misses its objectives even without."""
    if state.first_token[request] - state.arrival[request] > state.scalars[SLO_TTFT_S]:
        return DEAD
    elapsed = moment - state.first_token[request]
    step = state.scalars[FULL_STEP_S]
    tpot = state.scalars[SLO_TPOT_S]
    if final_slack_s(tpot, float(generated), elapsed, quantiles[2], step) < 0.0:
        return DEAD
    return float(final_slack_s(tpot, float(generated), elapsed, quantiles[0], step))


@compiled
def make_room(state: State, tokens: float, volume: float, least: float, moment: float) -> int:
    """Suspend the running request that can spare it most; return its instance, or -1 where none can.

    Parameters
    ----------
    tokens
        KV tokens that must become free on its instance.
    volume
        Memory-time of the request that needs the room.
    least
        Seconds that the suspended request must have to spare.
    """
    best, best_instance, best_generated = NOBODY, -1, 0
    best_score = -np.inf
    quantiles = np.empty(3)
    size = int(state.scalars[BLOCK_SIZE])
    for instance in range(len(state.time)):
        if state.closed[instance] != 0:
            continue
        done = max(min(steps_by(state, instance, moment), state.planned[instance] - 1), 0)
        step = state.step[instance] + done
        free = state.total_blocks[instance] * size - state.expected[instance, 0]
        for at in range(state.batch[instance]):
            request = state.slot_request[instance, at]
            if state.moving[request] != 0 or state.target[request] != NOBODY or np.isnan(state.first_token[request]):
                continue
            generated = state.output[request] - (state.slot_finish[instance, at] - step)
            resident = state.prompt[request] + generated
            if free + resident < tokens:
                continue
            predict(state, request, generated, quantiles)
            own = memory_time(float(resident), quantiles[1])
            if own < state.scalars[SUSPEND_RATIO] * volume:
                continue
            spare = slack(state, request, generated, moment, quantiles)
            if DEAD < spare < least:
                continue
            score = 1e9 + own if spare == DEAD else spare
            if score > best_score:
                best, best_instance, best_generated, best_score = request, instance, generated, score
    if best != NOBODY:
        _forget(state, best, best_instance, best_generated)
        state.moving[best] = 2
        state.leaving_list[best_instance, state.leaving_count[best_instance]] = best
        state.leaving_count[best_instance] += 1
        poke(state, best_instance, moment)
    return int(best_instance)


@compiled
def _forget(state: State, request: int, instance: int, generated: int) -> None:
    """Take a request out of its instance's forecast."""
    quantiles, points = np.empty(3), len(state.grid)
    mean, variance = np.zeros(points), np.zeros(points)
    predict(state, request, generated, quantiles)
    own_curve(float(state.prompt[request] + generated), quantiles, WEIGHTS, state.grid, mean, variance)
    for point in range(points):
        state.expected[instance, point] = max(state.expected[instance, point] - mean[point], 0.0)
        state.variance[instance, point] = max(state.variance[instance, point] - variance[point], 0.0)


@compiled
def next_to_resume(state: State, moment: float, quantiles: NDArray[np.float64]) -> tuple[int, float]:
    """Return the position of the suspended request with the least to spare, the lost last, and its slack; -1 for none.

    One that has been suspended for too long has nothing to spare.
    """
    best, best_key, best_slack = -1, np.inf, 0.0
    for position in range(state.counters[SUSPENDED_COUNT]):
        request = state.suspended_list[position]
        predict(state, request, state.generated[request], quantiles)
        spare = slack(state, request, state.generated[request], moment, quantiles)
        key = 1e9 + state.suspended_at[request] if spare == DEAD else spare
        if moment - state.suspended_at[request] > state.scalars[LONGEST_SUSPENSION_S]:
            spare = key = 0.0
        if key < best_key:
            best, best_key, best_slack = position, key, spare
    return best, best_slack


@compiled
def is_urgent(state: State, spare: float) -> bool:
    """Whether a suspended request with so much to spare goes before all others."""
    return bool(DEAD < spare < state.scalars[URGENT_S])


@compiled
def take_suspended(state: State, position: int) -> None:
    """Remove a request from the list of the suspended."""
    last = state.counters[SUSPENDED_COUNT] - 1
    state.suspended_list[position] = state.suspended_list[last]
    state.counters[SUSPENDED_COUNT] = last
