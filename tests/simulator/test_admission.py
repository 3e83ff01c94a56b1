"""Admission inside the event loop decides what the live one decides on the same states."""

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ares.policy import Cluster, preset
from ares.policy.admission import ORDERS, Candidates, Forecast, Progress
from ares.policy.admission.state import SUSPENDED, WAITING
from ares.simulator.admission import admit_waiting
from ares.simulator.cluster import Simulation
from ares.simulator.decisions import refresh
from ares.simulator.error_models import ERROR_MODELS
from ares.simulator.loop import handle_events
from ares.simulator.prediction import LEVELS, predict
from ares.simulator.state import NONE, NOT_LEAVING, SUSPENDING, State
from ares.simulator.step_time import steps_by
from tests.simulator.test_reference import small, workload

pytestmark = pytest.mark.timeout(600)  # the simulator may have to be compiled first

Decision = tuple[str, int, int]


class Seen:
    """A state as a live gateway would see it."""

    def __init__(self, state: State, moment: float) -> None:
        self.state, self.moment = state, moment
        # Instance, request, tokens generated, and whether it runs.
        self.rows: list[tuple[int, int, int, bool]] = []
        for instance in range(len(state.time)):
            done = max(min(steps_by(state, instance, moment), state.planned[instance] - 1), 0)
            for at in range(state.batch[instance]):
                request = int(state.slot_request[instance, at])
                left = state.slot_finish[instance, at] - (state.step[instance] + done)
                self.rows.append((instance, request, int(state.output[request] - left), True))
            coming = [
                *state.prefilling_list[instance, : state.prefilling[instance]],
                *state.ready_list[instance, : state.ready_count[instance]],
                *state.arriving_list[instance, : state.arriving_count[instance]],
            ]
            waiting = state.head[instance]
            while waiting != NONE:
                coming.append(waiting)
                waiting = state.next_request[waiting]
            self.rows += [(instance, int(request), int(state.generated[request]), False) for request in coming]
        waiting = np.flatnonzero(state.status == WAITING)
        self.outside = [*waiting.tolist(), *np.flatnonzero(state.status == SUSPENDED).tolist()]

    def remaining(self, requests: list[int], generated: list[int]) -> np.ndarray:
        quantiles = np.empty((len(requests), len(LEVELS)))
        for row, request, count in zip(quantiles, requests, generated, strict=True):
            predict(self.state, request, count, row)
        return quantiles

    def progress(self, requests: list[int], generated: list[int]) -> Progress:
        state = self.state
        first = state.first_token[requests]
        return Progress(
            generated=np.array(generated, np.int64),
            age_s=self.moment - state.arrival[requests],
            elapsed_s=self.moment - first,
            ttft_s=state.ttft[requests],
            tpot_s=state.tpot[requests],
            gap_s=state.gap[requests],
            longest_gap_s=state.longest_gap[requests],
            rank=state.rank[requests],
        )

    def cluster(self) -> Cluster:
        state = self.state
        where, requests, generated = ([row[n] for row in self.rows] for n in range(3))
        free = [
            running and state.leaving[request] == NOT_LEAVING and not np.isnan(state.first_token[request])
            for _, request, _, running in self.rows
        ]
        return Cluster(
            instances=tuple(f"i{n}" for n in range(len(state.time))),
            capacity_tokens=state.total_blocks * state.parameters.block_size,
            promised_tokens=state.promised * state.parameters.block_size,
            open=state.closed == 0,
            requests=tuple(map(str, requests)),
            location=np.array(where, np.int64),
            resident_tokens=state.prompt[requests] + np.array(generated, np.int64),
            movable=np.array(free, np.bool_),
            remaining_tokens=self.remaining(requests, generated),
            levels=LEVELS,
            step_base_s=state.step_model[:, 0].copy(),
            step_request_s=state.step_model[:, 1].copy(),
            step_token_s=state.step_model[:, 2].copy(),
            block_tokens=int(state.parameters.block_size),
        )

    def candidates(self) -> Candidates:
        state, requests = self.state, self.outside
        generated = state.generated[requests].tolist()
        suspended = state.status[requests] == SUSPENDED
        return Candidates(
            requests=tuple(map(str, requests)),
            tokens=state.prompt[requests] + state.generated[requests],
            remaining_tokens=self.remaining(requests, generated),
            rank=state.rank[requests],
            waited_s=self.moment - state.waiting_since[requests],
            suspended=suspended,
            progress=self.progress(requests, generated),
        )

    def decided(self, policy: Forecast) -> set[Decision]:
        running = self.progress([row[1] for row in self.rows], [row[2] for row in self.rows])
        entries = policy.decide(self.cluster(), self.candidates(), running)
        names = {True: [row[1] for row in self.rows], False: self.outside}
        return {(e.kind, names[e.kind == "suspend"][e.index], e.instance) for e in entries}


def decided(state: State, moment: float) -> set[Decision]:
    """What the event loop decides."""
    before = state.status.copy()
    leaving = state.leaving == SUSPENDING
    admit_waiting(state, moment)
    found: set[Decision] = set()
    for request in np.flatnonzero(before != state.status).tolist():
        kind = {WAITING: "admit", SUSPENDED: "resume"}[int(before[request])]
        found.add((kind, request, int(state.decode_instance[request])))
    for request in np.flatnonzero((state.leaving == SUSPENDING) & ~leaving).tolist():
        found.add(("suspend", request, int(state.decode_instance[request])))
    return found


@pytest.mark.parametrize("error", ["exact", "continuous"])
@pytest.mark.parametrize("queue", ORDERS)
@settings(max_examples=4, deadline=None)
@example(seed=0, classes=False)
@example(seed=0, classes=True)
@given(seed=st.integers(0, 2**16), classes=st.booleans())
def test_decides_as_the_live_gateway(seed: int, error: str, queue: str, *, classes: bool) -> None:
    chosen = preset("ares-suspension")
    # A full step takes 27 ms: a request that has run for a while has slack.
    settings = {"after_s": 0.2, "least_slack_s": 1.0, "urgent_s": 0.5, "least_gap_s": 1.0, "order": queue}
    chosen = replace(chosen, admission_settings=replace(chosen.admission_settings, **settings))
    work = workload(seed, 400, 12.0, longest=900)
    simulation = Simulation(
        work, [small(4000)] * 3, [small(60_000)], chosen, "x", ERROR_MODELS[error], seed=seed, ttft_s=4.0, tpot_s=0.06
    )
    state = simulation.build()
    if classes:
        random = np.random.default_rng(seed)
        state.rank[:] = random.integers(0, 2, len(work))
        state.ttft[:] = random.choice([2.0, 4.0, 8.0], len(work))
        state.tpot[:] = random.choice([0.05, 0.06], len(work))
        state.gap[:] = random.choice([0.5, 2.0, 5.0, np.inf], len(work))
    kinds: Counter[str] = Counter()
    for moment in np.arange(1.0, 30.0, 0.1):
        handle_events(state, moment)
        for instance in range(len(state.time)):
            refresh(state, instance, moment)
        policy = Forecast(chosen.admission_settings)
        policy.age_credit = state.current.age_credit
        expected = Seen(state, moment).decided(policy)
        copied = copy.deepcopy(state)
        assert decided(copied, moment) == expected, moment
        assert copied.current.age_credit == policy.age_credit
        kinds.update(kind for kind, _, _ in expected)
    assert kinds["admit"]
    if (seed, queue, classes) == (0, "shortest_memory_time", False):  # the one example that must have met everything
        assert kinds.keys() >= {"admit", "suspend", "resume"}
