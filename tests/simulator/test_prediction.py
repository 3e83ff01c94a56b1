"""What the simulator expects of requests: a predictor's errors, or residual life."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ares.gateway.control.lengths import LengthHistory
from ares.gateway.session.length_features import LengthFeatures
from ares.policy import preset
from ares.policy.admission.state import WAITING
from ares.policy.length_cells import request_keys
from ares.policy.residual_life import REMEMBERED
from ares.simulator.admission import refresh_and_admit
from ares.simulator.cluster import Simulation
from ares.simulator.error_models import ERROR_MODELS
from ares.simulator.loop import handle_events
from ares.simulator.prediction import predict
from ares.simulator.queues import record_finish
from ares.simulator.state import FINISHED, State, allocate
from ares.traces.workload import NO_TEMPLATE, Workload
from tests.simulator.test_reference import small, workload


def make() -> State:
    state = allocate(3, 1, 0, 1, 16)
    state.output[:] = 9000
    parameters = state.parameters
    parameters.has_predictions = 1
    parameters.sigma_start, parameters.sigma_end, parameters.sigma_tokens = 0.9, 0.1, 3500.0
    state.parameters.longest_output = 9000
    return state


def test_a_prediction_depends_on_nothing_but_request_and_length() -> None:
    """Draws are kept for an epoch: whatever was asked before, the same question has the same answer."""
    random, used = np.random.default_rng(0), make()
    got, expected = np.empty(3), np.empty(3)
    for _ in range(300):
        request, generated = int(random.integers(3)), int(random.integers(9000))
        predict(used, request, generated, got)
        predict(make(), request, generated, expected)
        np.testing.assert_array_equal(got, expected)
        assert (np.diff(got) >= 0).all()


def ended(lengths: list[int], longest: int) -> State:
    """Make a state in which outputs of these lengths have ended, and a further request runs."""
    state = allocate(len(lengths) + 1, 1, 0, 1, 16)
    state.output[:] = [*lengths, longest]
    state.parameters.has_predictions = state.parameters.residual_life = 1
    state.parameters.longest_output = longest
    for request in range(len(lengths)):
        record_finish(state, request, float(request))
    return state


@given(
    seed=st.integers(0, 1000),
    count=st.one_of(st.integers(0, 60), st.integers(REMEMBERED - 5, REMEMBERED + 300)),
    longest=st.sampled_from([3, 100, 30_000]),
    asked=st.lists(st.floats(0, 1), min_size=1, max_size=8),
)
def test_residual_life_is_the_gateways(seed: int, count: int, longest: int, asked: list[float]) -> None:
    lengths = np.random.default_rng(seed).integers(1, longest + 1, count).tolist()
    state, history, got = ended(lengths, longest), LengthHistory(), np.empty(3)
    for length in lengths:
        history.add(length)
    for generated in (int(share * longest) for share in asked):
        predict(state, count, generated, got)
        # As the gateway bounds it (view.py).
        assert got.tolist() == [min(max(q, 1.0), longest - generated) for q in history.remaining(generated)]


def test_a_run_goes_on_from_the_outputs_that_had_ended_before() -> None:
    before, now = [*range(100, 140), *range(300, 340)], [50] * 40
    history, got = LengthHistory(), np.empty(3)
    error = ERROR_MODELS["residual-life"]
    simulation = Simulation(workload(0, 60, 5.0), [small()], [small()], preset("ares"), "ares", error)
    simulation.ended_before, simulation.limit_tokens = before, 320
    state = simulation.build()
    for length in before:
        history.add(length)
    for generated in (0, 120):
        predict(state, 0, generated, got)
        assert got.tolist() == [min(q, 320 - generated) for q in history.remaining(generated)]
    state.output[:40] = now
    for request, length in enumerate(now):
        record_finish(state, request, float(request))
        history.add(length)
    predict(state, 50, 0, got)
    assert got.tolist() == [min(q, 320.0) for q in history.remaining(0)]


def test_length_curves_are_the_gateways() -> None:
    """By the same cells: of prompt lengths and of templates, whichever have at least two outputs."""
    random = np.random.default_rng(4)
    count = 400
    template = random.integers(0, 3, count)
    prompts = random.choice([20, 300, 301, 4000], count)
    outputs = np.where(template == 0, 40, prompts) + random.integers(1, 20, count)
    templates = np.stack([template, np.where(template == 2, 100 + np.arange(count), -1)], axis=1)
    arrival = np.arange(count) * 0.1
    work = Workload("made", arrival, prompts, outputs, templates=templates)
    error = ERROR_MODELS["length-curves"]
    simulation = Simulation(work, [small(90_000)], [small(90_000)], preset("ares"), "ares", error)
    simulation.ended_before, simulation.limit_tokens = [70, 80, 90], 10_000
    state, history, got = simulation.build(), LengthHistory(), np.empty(3)
    for length in simulation.ended_before:
        history.add(length)
    features = [
        LengthFeatures(request_keys(int(tokens), [int(one) for one in row if one != NO_TEMPLATE]))
        for tokens, row in zip(prompts, templates, strict=True)
    ]
    for request in range(count - 20):
        record_finish(state, request, float(request))
        history.add(int(outputs[request]), features[request])
        if request % 40 == 0:
            for asked in range(count - 20, count):
                for generated in (0, 30, 500):
                    predict(state, asked, generated, got)
                    expected = history.remaining(generated, features[asked])
                    assert got.tolist() == [min(max(q, 1.0), 10_000 - generated) for q in expected]
    short, long = (next(n for n in range(count - 20, count) if (template[n] == 0) == is_short) for is_short in (1, 0))
    predict(state, short, 0, got)
    assert 40 <= got[1] <= 60
    predict(state, long, 0, got)
    assert abs(got[1] - prompts[long]) < 0.1 * prompts[long] + 20


def test_by_length_curves_the_queue_stays_sorted() -> None:
    state = until(30.0, "length-curves", before=[100] * 1500)
    waiting = state.order[: state.current.queue_size]
    assert len(waiting) > 10
    assert len(np.unique(state.observed_remaining[waiting], axis=0)) > 1
    places = list(zip(state.rank[waiting], state.ttft_missed[waiting], state.queue_key[waiting], strict=True))
    assert places == sorted(places)


def until(moment: float, error: str, change: np.ndarray | None = None, before: Sequence[int] = ()) -> State:
    """Run a cluster that is too small for its load up to a moment, after outputs of these lengths have ended.

    `change` is added to the outputs.
    """
    work = workload(3, 150, 20.0)
    simulation = Simulation(
        work, [small(2000)] * 2, [small(4000)] * 2, preset("ares"), "ares", ERROR_MODELS[error], 0.25
    )
    simulation.ended_before = before
    state = simulation.build()
    if change is not None:
        state.output[:] += change
    for now in np.arange(0.25, moment, 0.25):
        handle_events(state, now)
        refresh_and_admit(state, now)
    return state


def test_residual_life_never_looks_ahead() -> None:
    """Outputs that have not ended yet may be of any length: nothing that was expected before changes."""
    first = until(30.0, "residual-life")
    running = (first.status != FINISHED).astype(np.int64)
    assert 40 < int(first.current.finished) < 110
    second = until(30.0, "residual-life", 37 * running)
    np.testing.assert_array_equal(first.status, second.status)
    np.testing.assert_array_equal(first.observed_tokens, second.observed_tokens)
    np.testing.assert_array_equal(first.observed_remaining, second.observed_remaining)
    assert len(np.unique(first.observed_remaining[running == 1], axis=0)) > 7
    true = until(30.0, "exact"), until(30.0, "exact", 37 * running)
    assert (true[0].observed_remaining != true[1].observed_remaining).any(), "a predictor does look ahead"


def test_who_waits_is_expected_to_go_on_as_the_newest_outputs_did() -> None:
    """A gateway asks its history at every decision, not when a request arrives."""
    state, quantiles = until(30.0, "residual-life"), np.empty(3)
    waiting = state.order[: state.current.queue_size]
    assert len(waiting) > 10
    assert (state.status[waiting] == WAITING).all()
    predict(state, int(waiting[0]), 0, quantiles)
    np.testing.assert_array_equal(state.observed_remaining[waiting], np.tile(quantiles, (len(waiting), 1)))
    punctual = waiting[state.ttft_missed[waiting] == 0]
    assert (np.diff(state.prompt[punctual]) >= 0).all(), "the same is expected of all: the shortest prompt is first"


def test_while_many_requests_run_for_each_that_has_ended_all_are_taken_alike() -> None:
    state = until(30.0, "length-curves")
    waiting = state.order[: state.current.queue_size]
    assert 0 < state.current.finished < 8 * (state.current.next_arrival - state.current.finished)
    assert len(np.unique(state.observed_remaining[waiting], axis=0)) == 1


def test_length_curves_never_look_ahead() -> None:
    first = until(30.0, "length-curves", before=[100] * 1500)
    running = (first.status != FINISHED).astype(np.int64)
    second = until(30.0, "length-curves", 37 * running, before=[100] * 1500)
    np.testing.assert_array_equal(first.status, second.status)
    np.testing.assert_array_equal(first.observed_remaining, second.observed_remaining)


@pytest.mark.parametrize("name", ["static-least-loaded", "ares"])
def test_what_predicts_nothing_changes_nothing_where_nothing_asks(name: str) -> None:
    work, decode = workload(1, 80, 20.0), [small(), small(2000)]
    finishes = [
        Simulation(work, decode, [small(4000)], preset(name), name, ERROR_MODELS[error], 0.25).run().finish_s
        for error in ("none", "residual-life")
    ]
    assert (finishes[0] == finishes[1]).all() == (name == "static-least-loaded")
