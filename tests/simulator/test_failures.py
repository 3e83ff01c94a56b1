"""Where requests go when their instance is lost."""

import numpy as np

from ares.policy import preset
from ares.simulator.cluster import Simulation
from ares.traces import Workload
from tests.simulator.test_reference import small


def test_a_lost_request_goes_where_its_generated_tokens_leave_most_room() -> None:
    """Instance 1 is empty but small: it is the least loaded for the 50 tokens of the prompt, not for all 700."""
    work = Workload("lost", np.array([0.0, 0.1, 10.0]), np.array([50, 10, 1200]), np.array([1100, 5, 390]))
    decode = [small(4000), small(1600), small(8000)]
    simulation = Simulation(work, decode, [], preset("static-rr"))
    simulation.failures = [(12.0, 0)]
    outcome = simulation.run()
    assert outcome.state.decode_instance.tolist() == [2, 1, 2]
