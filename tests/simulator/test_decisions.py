"""Shortcuts of the event loop choose what the policy's plain rules choose."""

import numpy as np
import pytest

from ares.policy import preset
from ares.policy.dispatch.least_loaded import least_loaded_choice
from ares.simulator.cluster import Simulation
from ares.simulator.decisions import least_loaded, used_tokens
from ares.simulator.loop import handle_events
from ares.traces import Workload
from tests.simulator.test_reference import small, workload


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rate", [5.0, 40.0])
def test_least_loaded_equals_the_rule_over_every_load(seed: int, rate: float) -> None:
    work = workload(seed, 200, rate)
    sizes = [1600, 1616, 1632, 1600, 1584, 1616]
    state = Simulation(work, [small(size) for size in sizes], [small(4000)], preset("static-rr"), "rr").build()
    capacity = state.total_blocks * state.parameters.block_size
    chosen = set()
    for moment in np.random.default_rng(seed).uniform(0, 200 / rate * 2, 150).cumsum() / 75:
        handle_events(state, moment)
        state.closed[seed] = moment > 20 / rate
        load = np.array([used_tokens(state, instance, moment) for instance in range(len(sizes))])
        for tokens in (1, 200, 1400):
            expected = least_loaded_choice(load, capacity, state.closed, tokens)
            assert least_loaded(state, tokens, moment) == expected
            chosen.add(expected)
    assert len(chosen) > 2
    state.closed[:] = 1
    assert least_loaded(state, 10, moment) == -1


def test_a_prompt_in_progress_counts_once_whatever_part_of_its_blocks_it_has() -> None:
    """As at the gateway, whose sessions count with their tokens; here its chunks are of 256 and 134 tokens."""
    work = Workload("one", np.zeros(1), np.array([390]), np.array([5]))
    state = Simulation(work, [small()], [], preset("static-rr")).build()
    computed = set()
    for moment in np.arange(0.01, 0.06, 0.01):
        handle_events(state, moment)
        computed.add(int(state.computed[0]))
        assert state.prefilling[0] == 1
        assert used_tokens(state, 0, moment) == 390
    assert computed == {256, 390}
