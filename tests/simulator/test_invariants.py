"""I1, I2, I5, I6 and I8 under generated workloads, failures and policies; I3's counterpart is the count of steps."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ares.policy import PRESETS, Cluster, MigrationDecision, preset
from ares.policy.forecast import forecast, geometric_grid
from ares.simulator import cluster as cluster_module
from ares.simulator.cluster import Simulation
from ares.simulator.error_models import ERROR_MODELS
from ares.simulator.invariants import violations
from ares.traces import Workload
from tests.simulator.test_reference import small

requests = st.lists(st.tuples(st.floats(0, 20), st.integers(1, 600), st.integers(1, 700)), min_size=1, max_size=60)


def make(rows: list[tuple[float, int, int]]) -> Workload:
    rows = sorted(rows)
    arrival = np.array([row[0] for row in rows])
    prompt, output = (np.array([row[index] for row in rows], np.int64) for index in (1, 2))
    return Workload("generated", arrival, prompt, output)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=requests,
    name=st.sampled_from(sorted(PRESETS)),
    error=st.sampled_from(sorted(ERROR_MODELS)),
    prefill=st.integers(0, 2),
    failures=st.lists(st.tuples(st.floats(0.01, 25), st.integers(0, 2)), max_size=2, unique_by=lambda f: f[1]),
    seed=st.integers(0, 3),
)
def test_invariants(
    rows: list[tuple[float, int, int]],
    name: str,
    error: str,
    prefill: int,
    failures: list[tuple[float, int]],
    seed: int,
) -> None:
    work = make(rows)
    decode = [small(1600), small(2000), small(1440)]

    def run() -> cluster_module.Outcome:
        return Simulation(
            work, decode, [small(2400)] * prefill, preset(name), name, ERROR_MODELS[error], 0.25, seed, failures
        ).run()

    outcome = run()
    assert violations(outcome, 2400) == []
    again = run()  # I8: the same inputs and seed give the same run
    np.testing.assert_array_equal(outcome.finish_s, again.finish_s)
    assert [m.reason for m in outcome.moves] == [m.reason for m in again.moves]


def test_moves_happen_and_are_counted() -> None:
    """The generated cases are only worth something if moves, preemptions and failures occur in some of them."""
    random = np.random.default_rng(5)
    rows = [(float(t), int(n), int(o)) for t, n, o in zip(
        random.uniform(0, 10, 60), random.integers(1, 300, 60), random.choice([20, 900], 60), strict=True)]  # fmt: skip
    eager = preset("ares-rebalance")
    outcome = Simulation(
        make(rows), [small(3200)] * 3, [small(4000)], eager, "eager", ERROR_MODELS["exact"], 0.25, 0, [(6.0, 1)]
    ).run()
    assert violations(outcome, 4000) == []
    assert outcome.migrations > 1
    assert outcome.migrations == int(outcome.moved.sum())
    assert int(outcome.state.current.preemptions) == int(outcome.preempted.sum())
    assert len(outcome.moves) >= outcome.migrations
    assert int(outcome.state.current.migrations_refused) >= 0


@pytest.mark.parametrize("name", ["ares-rebalance", "paper"])
def test_targets_hold_on_the_forecast_that_decided(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I6: after each ordered move the target's forecast memory stays within its limit, promises included."""
    checked = 0
    _, _, policy, *_ = preset(name).make()
    decide, settings = policy.decide, policy.settings

    def watched(view: Cluster) -> list[MigrationDecision]:
        nonlocal checked
        moves = decide(view)
        grid = geometric_grid(settings.horizon, settings.points)
        for move in moves:
            location = view.location.copy()
            location[move.request] = move.target
            moved = replace(view, location=location)
            expected = forecast(moved, grid).expected[move.target]
            assert expected.max() <= view.capacity_tokens[move.target] * (1 - settings.reserve) + 1e-6
            assert view.location[move.request] == move.source != move.target
            assert view.movable[move.request]
            assert move.reason
            checked += 1
        assert len({m.request for m in moves}) == len(moves)
        assert not {m.source for m in moves} & {m.target for m in moves}, "no pair reversed in a round"
        return moves

    policy.decide = watched
    monkeypatch.setattr(cluster_module, "rebalancer", lambda *_: policy)
    random = np.random.default_rng(1)
    rows = [
        (float(t), 50, int(o)) for t, o in zip(random.uniform(0, 30, 80), random.choice([30, 1200], 80), strict=True)
    ]
    Simulation(make(rows), [small(3200)] * 4, [small(4000)], preset(name), name, ERROR_MODELS["exact"], 0.25).run()
    assert checked > 5
