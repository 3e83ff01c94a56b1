"""What is expected of requests: true remaining lengths with an error, or residual life."""

import math

import numpy as np
from numpy.typing import NDArray

from ares.policy import residual_life
from ares.policy.admission.order import memory_time as _memory_time
from ares.policy.forecast import quantile_weights
from ares.simulator.heaps import compiled
from ares.simulator.state import (
    ENDED_BEFORE,
    FINISHED_COUNT,
    FIRST_COME,
    HAS_PREDICTION,
    LONGEST,
    QUEUE_SIZE,
    RESIDUAL_LIFE,
    SEED,
    SIGMA_END,
    SIGMA_START,
    SIGMA_TOKENS,
    SUSPENDED_COUNT,
    State,
)

LEVELS = (0.1, 0.5, 0.9)
"""Levels of the quantiles that the simulated predictor gives."""
WEIGHTS = quantile_weights(LEVELS)
"""And the probability that each stands for."""

memory_time = compiled(_memory_time)
expect = compiled(residual_life.expect)
remember = compiled(residual_life.remember)

_Z90 = 1.2815515655446004
_EPOCH = 512  # generated tokens between two independent draws of the error


@compiled
def _uniform(seed: int, request: int, epoch: int) -> float:
    """Return a number in (0, 1) that depends on nothing but its arguments (splitmix64)."""
    mixed = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64(request) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(epoch) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (float(mixed >> np.uint64(11)) + 0.5) / 9007199254740992.0


@compiled
def _normal(seed: int, request: int, epoch: int) -> float:
    first, second = _uniform(seed, request, 2 * epoch), _uniform(seed, request, 2 * epoch + 1)
    return math.sqrt(-2.0 * math.log(first)) * math.cos(2.0 * math.pi * second)


@compiled
def _ended(state: State) -> int:
    """Return how many outputs have ended, those before the run included."""
    return int(state.scalars[ENDED_BEFORE] + state.counters[FINISHED_COUNT])


@compiled
def predict(state: State, request: int, generated: int, quantiles: NDArray[np.float64]) -> None:
    """Write the predictor's quantiles of the remaining tokens, shape (3,).

    The median is the truth times exp(sigma z): z is partly the request's own for life and partly drawn anew every
    512 tokens; sigma changes exponentially with the tokens generated so far. Residual life looks at no truth, but at
    the outputs that have ended.
    """
    if state.scalars[HAS_PREDICTION] == 0.0:
        quantiles[:] = np.nan
        return
    most = state.scalars[LONGEST] - generated  # max_tokens is known to every gateway
    if state.scalars[RESIDUAL_LIFE] > 0.0:
        expect(state.ended_sorted, _ended(state), generated, LEVELS, quantiles)
        for index in range(len(quantiles)):
            quantiles[index] = min(max(quantiles[index], 1.0), most)
        return
    true = float(state.output[request] - generated)
    start, end = state.scalars[SIGMA_START], state.scalars[SIGMA_END]
    if start <= 0.0 and end <= 0.0:
        quantiles[:] = true
        return
    sigma = end + (start - end) * math.exp(-generated / state.scalars[SIGMA_TOKENS])
    seed = int(state.scalars[SEED])
    epoch = 1 + generated // _EPOCH
    if state.error_epoch[request] != epoch:
        if state.error_epoch[request] == 0:
            state.error_own[request] = _normal(seed, request, 0)
        state.error_fresh[request] = _normal(seed, request, epoch)
        state.error_epoch[request] = epoch
    median = true * math.exp(sigma * (0.8 * state.error_own[request] + 0.6 * state.error_fresh[request]))
    quantiles[0] = min(max(median * math.exp(-_Z90 * sigma), 1.0), most)
    quantiles[1] = min(max(median, 1.0), most)
    quantiles[2] = min(max(median * math.exp(_Z90 * sigma), 1.0), most)


@compiled
def see(state: State, request: int, generated: int) -> None:
    """Note what telemetry says of a request that has generated so many tokens."""
    state.seen_tokens[request] = state.prompt[request] + generated
    state.seen_generated[request] = generated
    predict(state, request, generated, state.seen_remaining[request])


@compiled
def weigh(state: State, request: int) -> None:
    """Set who goes first and who is preempted first, from what is expected of a request that waits for decode."""
    if state.scalars[HAS_PREDICTION] > 0.0:
        key = memory_time(float(state.seen_tokens[request]), state.seen_remaining[request, 1])
        state.eviction_key[request] = key
        state.queue_key[request] = key
    if state.scalars[FIRST_COME] > 0.0:
        state.queue_key[request] = state.arrival[request]


@compiled
def learn(state: State, request: int) -> None:
    """Take the length of an output that ends now into the history, before it is counted as finished."""
    if state.scalars[RESIDUAL_LIFE] > 0.0:
        remember(state.ended_lately, state.ended_sorted, _ended(state), state.output[request])


@compiled
def expect_anew(state: State) -> None:
    """Look again at those outside decode, as a gateway does when an output has ended.

    None of those that wait has generated anything, so the same is expected of all, and their order stays.
    """
    if state.scalars[RESIDUAL_LIFE] > 0.0:
        for index in range(state.counters[QUEUE_SIZE]):
            see(state, state.order[index], state.generated[state.order[index]])
            weigh(state, state.order[index])
        for index in range(state.counters[SUSPENDED_COUNT]):
            see(state, state.suspended_list[index], state.generated[state.suspended_list[index]])
