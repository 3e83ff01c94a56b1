"""The compiled loops decide what plain numpy decides, whatever the rows."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ares.bench.decision import sample_cluster
from ares.policy import Cluster, MigrationDecision, Rebalance, forecast, rebalancer
from ares.policy.forecast import geometric_grid, plain_forecast
from ares.policy.oom_avoidance import OomAvoidanceSettings, avoid_oom
from ares.policy.rebalance import REBALANCERS
from ares.policy.rebalance import ares as balance
from tests.policy import reference_oom_avoidance, reference_rebalance
from tests.policy.test_admission_forecast import progress

LEVELS = {1: (0.5,), 3: (0.1, 0.5, 0.9), 5: (0.1, 0.3, 0.5, 0.7, 0.9)}


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Rows in any order, with or without predictions, on instances that differ, are closed, or hold promises."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    instances, rows, quantiles = draw(st.integers(2, 9)), draw(st.integers(0, 80)), draw(st.sampled_from([0, 1, 3, 5]))
    remaining = None
    if quantiles:
        remaining = np.sort(np.exp(random.uniform(-1, 10, (rows, quantiles))), axis=1)
        if draw(st.booleans()):
            remaining = remaining.round()
        remaining[random.random(rows) < 0.1] = np.nan
        remaining[random.random(rows) < 0.05] = np.inf
        remaining[random.random(rows) < 0.05] = -3.0
    skewed = np.minimum(random.integers(0, instances, rows), random.integers(0, instances, rows))
    cost = draw(st.sampled_from(["none", "equal", "unequal"]))
    spread = random.uniform(0.5, 2.0, (3, instances)) if cost == "unequal" else np.ones((3, instances))
    return Cluster(
        instances=tuple(f"d{index}" for index in range(instances)),
        capacity_tokens=random.integers(50_000, draw(st.sampled_from([100_000, 1_000_000])), instances),
        promised_tokens=random.integers(0, 2000, instances),
        open=random.random(instances) < 0.9,
        requests=np.arange(rows),
        location=skewed,
        resident_tokens=random.integers(1, 30_000, rows),
        movable=random.random(rows) < 0.8,
        remaining_tokens=remaining,
        levels=LEVELS[quantiles or 3],
        step_base_s=None if cost == "none" else 0.01 * spread[0],
        step_request_s=None if cost == "none" else 2e-5 * spread[1],
        step_token_s=None if cost == "none" else 1e-7 * spread[2],
        block_tokens=draw(st.sampled_from([1, 16, 128])),
    )


def plain(cluster: Cluster, policy: Rebalance) -> list[MigrationDecision]:
    """Decide without compiled code."""
    by_rule = {"ares": reference_rebalance.decide, "paper": reference_rebalance.decide_as_paper}
    return by_rule[policy.name](cluster, policy.settings)


@settings(max_examples=200)
@given(clusters(), st.sampled_from([(0, 64), (1, 4), (50, 8), (4000, 64), (16000, 64)]))
def test_the_forecast_has_the_same_bits(cluster: Cluster, shape: tuple[int, int]) -> None:
    grid = geometric_grid(*shape)
    got, expected = forecast(cluster, grid), plain_forecast(cluster, grid)
    np.testing.assert_array_equal(got.expected, expected.expected)
    np.testing.assert_array_equal(got.allocated, expected.allocated)
    np.testing.assert_array_equal(got.variance, expected.variance)
    np.testing.assert_array_equal(got.count, expected.count)


@settings(max_examples=200)
@given(clusters(), st.sampled_from(["ares", "paper"]), st.sampled_from([0.0, 0.05]), st.integers(1, 4))
def test_the_moves_are_the_same(cluster: Cluster, name: str, theta: float, budget: int) -> None:
    settings = REBALANCERS[name].Settings(theta=theta, minimum_gain=1e-6, amortise=0.5, moves_per_round=budget)
    policy = rebalancer(name, settings)
    got, expected = policy.decide(cluster), plain(cluster, policy)
    # Compiled code may add in another order, so that a gain differs in its last bit.
    assert [replace(move, gain=0.0) for move in got] == [replace(move, gain=0.0) for move in expected]
    assert [move.gain for move in got] == pytest.approx([move.gain for move in expected], rel=1e-12)


@settings(max_examples=200)
@given(clusters(), st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([0, 1, 250]), st.integers(0, 2**32))
def test_out_of_memory_avoidance_is_the_same(cluster: Cluster, lookahead_s: float, horizon: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    allocated = forecast(cluster, np.zeros(1, np.int64)).allocated[:, 0]
    full = allocated * random.uniform(0.9, 1.5, len(allocated)) + random.integers(1, 500, len(allocated))
    commanded = random.random(len(cluster.location)) < 0.1
    cluster = replace(
        cluster, capacity_tokens=full.astype(np.int64), commanded=commanded, movable=cluster.movable & ~commanded
    )
    stand = progress(
        len(commanded), generated=random.integers(0, 900, len(commanded)), elapsed_s=random.random(len(commanded))
    )
    settings = OomAvoidanceSettings(lookahead_s=lookahead_s, horizon=horizon)
    assert avoid_oom(cluster, settings, lambda: stand) == reference_oom_avoidance.avoid_oom(cluster, settings, stand)


@pytest.mark.parametrize("name", ["ares", "paper"])
def test_the_moves_of_the_benchmark_are_the_same(name: str) -> None:
    random = np.random.default_rng(3)
    for decode in (16, 64, 256):
        cluster = sample_cluster(decode, 128, random)
        policy = rebalancer(name)
        moves = policy.decide(cluster)
        assert moves
        assert moves == plain(cluster, policy)


WITHOUT_NUMBA = """
import sys

sys.modules["numba"] = None  # importing it fails
import numpy as np

from ares.bench.decision import sample_cluster
from ares.policy import rebalancer

policy = rebalancer("ares")
print(policy.decide(sample_cluster(16, 64, np.random.default_rng(0))))
"""


def test_without_numba_the_decisions_are_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True, check=True)
    policy = rebalancer("ares")
    assert done.stdout == f"{policy.decide(sample_cluster(16, 64, np.random.default_rng(0)))}\n"


LIGHT = "import sys, ares, ares.policy, ares.cli.main; print(sorted({'numba', 'llvmlite', 'torch'} & {*sys.modules}))"


def test_importing_the_policies_does_not_import_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_read_only_and_strided_rows_are_taken() -> None:
    cluster = sample_cluster(8, 32, np.random.default_rng(0))
    assert cluster.remaining_tokens is not None
    expected = balance.decide(cluster, balance.AresSettings())
    resident, wide = cluster.resident_tokens.copy(), np.repeat(cluster.remaining_tokens, 2, axis=1)
    resident.flags.writeable = False
    assert balance.decide(replace(cluster, resident_tokens=resident), balance.AresSettings()) == expected
    assert balance.decide(replace(cluster, remaining_tokens=wide[:, ::2]), balance.AresSettings()) == expected
