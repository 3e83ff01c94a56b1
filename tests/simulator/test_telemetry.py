"""What the policy sees of a simulated cluster is what the profile and the instances hold."""

import numpy as np

from ares.policy import preset
from ares.simulator.cluster import Simulation
from ares.simulator.loop import run_until
from ares.simulator.telemetry import Telemetry
from ares.traces import Workload
from tests.simulator.test_reference import small


def test_the_costs_of_a_move_are_the_profile_s() -> None:
    profile = small(stall_s=0.37, bandwidth_bytes_s=3e9)
    work = Workload("one", np.zeros(1), np.array([10]), np.array([5]))
    simulation = Simulation(work, [profile] * 2, [], preset("ares-rebalance"))
    view = Telemetry(simulation.preset, profile, simulation.build()).view(0.0)
    assert view.stall_s == 0.37
    assert view.transfer_bytes_s == 3e9
    assert view.token_bytes == profile.kv_bytes_per_token
