"""Compiled code reads and writes the arrays and records of a state."""

import copy
import pickle

import numpy as np
import pytest

from ares.simulator.blocks import blocks_for
from ares.simulator.heaps import compiled
from ares.simulator.queues import push_back, take_first
from ares.simulator.state import State, allocate


@compiled
def _mark(state: State) -> int:
    """Write into a 1-D and a 2-D array; return what the shapes say."""
    state.output[2] = 7
    state.phase[1, 3] += 4
    state.expected[1] += 0.5
    state.current.finished += 2
    state.current.age_credit = state.parameters.sigma_end + state.admission_settings.ratio
    return state.slot_request.shape[0] * 1000 + state.slot_request.shape[1] * 10 + len(state.prefill_free)


def test_compiled_code_writes_into_the_arrays_of_the_state() -> None:
    state = allocate(5, 3, 2, 4, 16)
    state.parameters.sigma_end, state.admission_settings.ratio = 0.25, 1.5
    assert _mark(state) == 3042
    assert (state.current.finished, state.current.age_credit) == (2, 1.75)
    assert sum(state.current) == 3.75, "no other field"
    assert state.output.tolist() == [0, 0, 7, 0, 0]
    assert state.phase[1, 3] == state.phase.sum() == 4
    assert state.expected.sum() == 0.5 * state.expected.shape[1]


def test_copies_have_arrays_of_their_own() -> None:
    state = allocate(5, 3, 2, 4, 16)
    state.parameters.block_size = 16
    state.prompt[:] = 10
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):  # noqa: S301 - our own bytes
        assert other.address != state.address
        assert blocks_for(other, 33) == 3
        push_back(other, 1, 2)
        assert (other.head[1], other.unallocated_tokens[1]) == (2, 10)
        assert state.unallocated_tokens[1] == 0
        assert take_first(other, 1) == 2


def test_arrays_that_compiled_code_would_misread_are_refused() -> None:
    state = allocate(5, 3, 2, 4, 16)
    arrays = dict(state.arrays())
    with pytest.raises(ValueError, match="prompt: must be a C-contiguous"):
        State(**(arrays | {"prompt": np.zeros(10, np.int64)[::2]}))
    with pytest.raises(ValueError, match="output: must be"):
        State(**(arrays | {"output": np.zeros(5, np.int32)}))
