"""Predicted remaining lengths: the true ones with an error, residual life, or length curves."""

import math

import numpy as np
from numpy.typing import NDArray

from ares.policy import length_curves, residual_life
from ares.policy.admission import loop
from ares.policy.admission.order import memory_time as _memory_time
from ares.policy.forecast import quantile_weights
from ares.policy.length_curves import ALL, ENDED_TO_RUNNING, Lengths
from ares.simulator.heaps import compiled, inlined
from ares.simulator.state import NONE, State

LEVELS = (0.1, 0.5, 0.9)
"""Levels of the quantiles that the simulated predictor gives."""
WEIGHTS = quantile_weights(LEVELS)
"""The probability that each quantile stands for, shape (3,)."""

memory_time = compiled(_memory_time)
expect = compiled(residual_life.expect)
remember = compiled(residual_life.remember)
add_length = compiled(length_curves.add)
compose = compiled(length_curves.compose)
expect_by_curve = compiled(length_curves.expect)
insert_in_order = loop.insert_in_order

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


@inlined
def _ended(state: State) -> int:
    """Return how many outputs have ended, those before the run included."""
    return int(state.parameters.ended_before + state.current.finished)


@inlined
def _expect_by_cells(state: State, chain: int, generated: int, quantiles: NDArray[np.float64]) -> None:
    """Write what length curves expect of a request with this chain of cells."""
    ended = _ended(state)
    if state.chain_outputs[chain] != ended:
        cells = np.empty(1 + state.chain_cells.shape[1], np.int64)
        cells[0], count = ALL, 1
        running = state.current.next_arrival - state.current.finished
        settled = ended >= ENDED_TO_RUNNING * running
        for cell in state.chain_cells[chain]:
            # With one output a gateway has no cell yet.
            if settled and cell != NONE and state.cell_count[cell] >= 2.0:
                cells[count] = cell
                count += 1
        lengths = Lengths(state.cell_ended, state.cell_cut, state.cell_count)
        compose(lengths, cells[:count], state.chain_longer[chain])
        state.chain_outputs[chain] = ended
    expect_by_curve(state.chain_longer[chain], generated, LEVELS, quantiles)


@inlined
def predict(state: State, request: int, generated: int, quantiles: NDArray[np.float64]) -> None:
    """Write the predictor's quantiles of the remaining tokens, shape (3,).

    The median is the truth times exp(sigma z): z is partly constant for a request and partly drawn again every
    512 tokens; sigma changes exponentially with the tokens generated so far. Residual life and length curves know only
    the lengths of the outputs that have ended.
    """
    if not state.parameters.has_predictions:
        quantiles[:] = np.nan
        return
    most = state.parameters.longest_output - generated  # max_tokens is known to every gateway
    if state.parameters.residual_life:
        if len(state.length_chain):
            _expect_by_cells(state, state.length_chain[request], generated, quantiles)
        else:
            expect(state.sorted_outputs, _ended(state), generated, LEVELS, quantiles)
        for index in range(len(quantiles)):
            quantiles[index] = min(max(quantiles[index], 1.0), most)
        return
    true = float(state.output[request] - generated)
    start, end = state.parameters.sigma_start, state.parameters.sigma_end
    if start <= 0.0 and end <= 0.0:
        quantiles[:] = true
        return
    sigma = end + (start - end) * math.exp(-generated / state.parameters.sigma_tokens)
    seed = state.parameters.seed
    epoch = 1 + generated // _EPOCH
    if state.error_epoch[request] != epoch:
        if state.error_epoch[request] == 0:
            state.error_constant[request] = _normal(seed, request, 0)
        state.error_redrawn[request] = _normal(seed, request, epoch)
        state.error_epoch[request] = epoch
    median = true * math.exp(sigma * (0.8 * state.error_constant[request] + 0.6 * state.error_redrawn[request]))
    quantiles[0] = min(max(median * math.exp(-_Z90 * sigma), 1.0), most)
    quantiles[1] = min(max(median, 1.0), most)
    quantiles[2] = min(max(median * math.exp(_Z90 * sigma), 1.0), most)


@compiled
def record_progress(state: State, request: int, generated: int) -> None:
    """Record what telemetry reports of a request that has generated `generated` tokens."""
    state.observed_tokens[request] = state.prompt[request] + generated
    state.observed_generated[request] = generated
    predict(state, request, generated, state.observed_remaining[request])


@inlined
def set_queue_keys(state: State, request: int) -> None:
    """Set a request's keys for admission order and preemption, from its predicted length."""
    if state.parameters.has_predictions:
        key = memory_time(float(state.observed_tokens[request]), state.observed_remaining[request, 1])
        state.preemption_key[request] = key
        state.queue_key[request] = key
    if state.parameters.first_come_first_served:
        state.queue_key[request] = state.arrival[request]


@inlined
def record_length(state: State, request: int) -> None:
    """Add the length of an output that ends now to the history, before it is counted as finished."""
    if state.parameters.residual_life:
        remember(state.recent_outputs, state.sorted_outputs, _ended(state), state.output[request])
    if len(state.length_chain):
        lengths = Lengths(state.cell_ended, state.cell_cut, state.cell_count)
        add_length(lengths, ALL, state.output[request], False)
        for cell in state.chain_cells[state.length_chain[request]]:
            if cell != NONE:
                add_length(lengths, cell, state.output[request], False)


@inlined
def refresh_predictions(state: State) -> None:
    """Update the predicted lengths of requests outside decode, as a gateway does when an output has ended.

    No waiting request has generated anything, so the prediction of residual life is the same for all, and their order
    stays. By length curves it is not, and they are sorted again.
    """
    if state.parameters.residual_life:
        for index in range(state.current.queue_size):
            record_progress(state, state.order[index], state.generated[state.order[index]])
            set_queue_keys(state, state.order[index])
        if len(state.length_chain):
            for index in range(1, state.current.queue_size):
                request = state.order[index]
                insert_in_order(state.order, index, request, state.rank, state.ttft_missed, state.queue_key)
        for index in range(state.current.suspended_count):
            record_progress(state, state.suspended_list[index], state.generated[state.suspended_list[index]])
