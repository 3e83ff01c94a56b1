"""What the policy sees of a simulated cluster is what the profile and the instances hold."""

import numpy as np

from ares.policy import preset
from ares.simulator.cluster import Simulation
from ares.simulator.loop import handle_events
from ares.simulator.telemetry import Telemetry
from ares.traces import Workload
from tests.simulator.test_reference import small


def test_the_costs_of_a_move_are_the_profile_s() -> None:
    profile = small(stall_s=0.37, bandwidth_bytes_s=3e9)
    work = Workload("one", np.zeros(1), np.array([10]), np.array([5]))
    simulation = Simulation(work, [profile] * 2, [], preset("ares-rebalance"))
    view = Telemetry(simulation.preset, profile, simulation.build()).cluster(0.0)
    assert view.stall_s == 0.37
    assert view.transfer_bytes_s == 3e9
    assert view.token_bytes == profile.kv_bytes_per_token


def test_every_request_at_an_instance_is_seen_once_with_all_its_tokens() -> None:
    """Those that run, wait, are preempted, or have their KV on the way: no policy has to add a queue to the load."""
    work = Workload("burst", np.zeros(12), np.full(12, 390), np.full(12, 400))
    simulation = Simulation(work, [small()], [], preset("static-rr"))
    state = simulation.build()
    telemetry = Telemetry(simulation.preset, simulation.decode[0], state)
    waited = preempted = 0
    for moment in np.arange(0.5, 20.0, 0.5):
        handle_events(state, moment)
        view = telemetry.cluster(moment)
        unfinished = np.flatnonzero(np.isnan(state.finish))
        assert sorted(view.requests) == unfinished.tolist()
        generated = telemetry.progress(len(view.requests), moment).generated
        assert view.load_tokens().tolist() == [int((390 + generated).sum())]
        waited = max(waited, int(state.waiting_count[0]))
        preempted = max(preempted, int(state.preempted.sum()))
    assert waited > 5
    assert preempted > 0
