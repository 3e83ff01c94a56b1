"""The compiled loops decide what plain numpy decides, whatever the rows."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ares.bench.decision import sample_cluster
from ares.policy import Cluster, Move, Rebalance, forecast, kernels, rebalancer
from ares.policy.forecast import geometric_grid, plain_forecast
from ares.policy.rebalance import REBALANCERS
from ares.policy.rebalance import ares as balance

LEVELS = {1: (0.5,), 3: (0.1, 0.5, 0.9), 5: (0.1, 0.3, 0.5, 0.7, 0.9)}


class Reference(balance._Round):
    """A decision whose choice of moves is written with whole arrays."""

    def _take(
        self,
        rows: np.ndarray,
        which: np.ndarray,
        sources: np.ndarray,
        targets: np.ndarray,
        gain: np.ndarray,
        budget: int,
    ) -> list[Move]:
        starts = np.flatnonzero(np.diff(which, prepend=-1))
        best = np.maximum.reduceat(gain, starts, axis=0)
        moves: list[Move] = []
        tries = balance._TRIES
        while len(moves) < budget and tries > 0:
            group, column = divmod(int(np.argmax(best)), best.shape[1])
            if best[group, column] <= self.settings.minimum_gain:
                break
            start = int(starts[group])
            end = int(starts[group + 1]) if group + 1 < len(starts) else len(rows)
            index = start + int(np.argmax(gain[start:end, column]))
            source, target = int(sources[which[index]]), int(targets[column])
            move = self._close_look(int(rows[index]), source, target)
            if move is None:
                tries -= 1
                gain[index, column] = -np.inf
                best[group, column] = gain[start:end, column].max()
                continue
            moves.append(move)
            best[group, :] = -np.inf
            best[:, column] = -np.inf
            best[:, targets == source] = -np.inf
            best[sources[which[starts]] == target, :] = -np.inf
        return moves

    def _close_look(self, row: int, source: int, target: int) -> Move | None:
        settings, law, ahead = self.settings, self.law, self.ahead
        alive, tokens = (curve[0] for curve in balance._curves(self.cluster, np.array([row]), self.steps))
        variance = tokens * (self.cluster.resident_tokens[row] + self.steps - tokens)
        spread = np.sqrt(ahead.variance[target] + variance)
        held = self.cluster.resident_tokens[row] + self.steps
        if (block := self.cluster.block_tokens) > 1:
            held = np.ceil((held + 1.0) / block) * block
        peak = float((ahead.held[target] + alive * held + settings.deviations * spread).max())
        if peak > self.limit[target]:
            return None
        leaves = law.request[source] * alive + law.token[source] * tokens
        enters = law.request[target] * alive + law.token[target] * tokens
        change = (2.0 * self.time[source] - leaves) * leaves - (2.0 * self.time[target] + enters) * enters
        excess = self.excess[source]
        left = np.maximum(excess - tokens, 0.0)
        gain = float(change @ self.beta) / self.mean**2
        memory = float((excess * excess - left * left) @ self.beta) / max(float(self.limit[source]), 1.0) ** 2
        gain += settings.memory_weight * memory
        if gain <= settings.minimum_gain:
            return None
        unit, factor = ("ms", 1e3) if law.known else ("tokens", 1.0)
        before = (self.load[source] * factor, self.load[target] * factor)
        after = (before[0] - float(leaves @ self.beta) * factor, before[1] + float(enters @ self.beta) * factor)
        cause = "memory" if excess.any() else "load"
        reason = (
            f"{cause}: source {before[0]:.4g} to {after[0]:.4g} {unit}, target {before[1]:.4g} to {after[1]:.4g}, "
            f"mean {self.mean * factor:.4g}; target peak {peak:.0f} of {self.limit[target]:.0f} tokens"
        )
        return Move(request=row, source=source, target=target, gain=gain, reason=reason)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Rows in any order, with or without predictions, on instances that differ, are closed, or hold promises."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    instances, rows, atoms = draw(st.integers(2, 9)), draw(st.integers(0, 80)), draw(st.sampled_from([0, 1, 3, 5]))
    remaining = None
    if atoms:
        remaining = np.sort(np.exp(random.uniform(-1, 10, (rows, atoms))), axis=1)
        if draw(st.booleans()):
            remaining = remaining.round()
        remaining[random.random(rows) < 0.1] = np.nan
        remaining[random.random(rows) < 0.05] = np.inf
        remaining[random.random(rows) < 0.05] = -3.0
    skewed = np.minimum(random.integers(0, instances, rows), random.integers(0, instances, rows))
    law = draw(st.sampled_from(["none", "equal", "unequal"]))
    spread = random.uniform(0.5, 2.0, (3, instances)) if law == "unequal" else np.ones((3, instances))
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
        levels=LEVELS[atoms or 3],
        step_base_s=None if law == "none" else 0.01 * spread[0],
        step_request_s=None if law == "none" else 2e-5 * spread[1],
        step_token_s=None if law == "none" else 1e-7 * spread[2],
        block_tokens=draw(st.sampled_from([1, 16, 128])),
    )


def plain(cluster: Cluster, policy: Rebalance) -> list[Move]:
    """Decide without compiled code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "forecast", plain_forecast)
        patch.setattr(balance, "_Round", Reference)
        patch.setattr(balance, "compiled", lambda _: None)
        return policy.decide(cluster)


def same(got: list[Move], expected: list[Move]) -> None:
    assert [replace(move, gain=0.0) for move in got] == [replace(move, gain=0.0) for move in expected]
    np.testing.assert_allclose([move.gain for move in got], [move.gain for move in expected], rtol=1e-9)


@settings(max_examples=200)
@given(clusters(), st.sampled_from([(0, 64), (1, 4), (50, 8), (4000, 64), (16000, 64)]))
def test_the_forecast_has_the_same_bits(cluster: Cluster, shape: tuple[int, int]) -> None:
    grid = geometric_grid(*shape)
    got, expected = forecast(cluster, grid), plain_forecast(cluster, grid)
    np.testing.assert_array_equal(got.expected, expected.expected)
    np.testing.assert_array_equal(got.held, expected.held)
    np.testing.assert_array_equal(got.variance, expected.variance)
    np.testing.assert_array_equal(got.count, expected.count)


@given(clusters(), st.sampled_from([0.0, 1.3]))
def test_the_loads_have_the_same_bits(cluster: Cluster, deviations: float) -> None:
    ahead = forecast(cluster, geometric_grid(4000, 64))
    law, limit = balance._Law.of(cluster), cluster.capacity_tokens * 0.05
    time, excess = balance._loads(ahead, law, limit, deviations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "compiled", lambda _: None)
        plain_time, plain_excess = balance._loads(ahead, law, limit, deviations)
    np.testing.assert_array_equal(time, plain_time)
    np.testing.assert_array_equal(excess, plain_excess)


@settings(max_examples=200)
@given(clusters(), st.sampled_from(["ares", "paper"]), st.sampled_from([0.0, 0.05]), st.integers(1, 4))
def test_the_moves_are_the_same(cluster: Cluster, name: str, theta: float, budget: int) -> None:
    knobs = REBALANCERS[name].Settings(theta=theta, minimum_gain=1e-6, amortise=0.5, moves_per_round=budget)
    policy = rebalancer(name, knobs)
    same(policy.decide(cluster), plain(cluster, policy))


@pytest.mark.parametrize("name", ["ares", "paper"])
def test_the_moves_of_the_benchmark_are_the_same(name: str) -> None:
    random = np.random.default_rng(3)
    for decode in (16, 64, 256):
        cluster = sample_cluster(decode, 128, random)
        policy = rebalancer(name)
        moves = policy.decide(cluster)
        assert moves
        same(moves, plain(cluster, policy))


def test_without_numba_the_decisions_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = sample_cluster(16, 64, np.random.default_rng(0))
    expected = balance.decide(cluster, balance.AresSettings())
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it fails
    kernels.compiled.cache_clear()
    try:
        kernels.prepare()
        assert kernels.compiled(kernels.take_pairs) is None
        same(balance.decide(cluster, balance.AresSettings()), expected)
    finally:
        kernels.compiled.cache_clear()


def test_read_only_and_strided_rows_are_taken() -> None:
    cluster = sample_cluster(8, 32, np.random.default_rng(0))
    assert cluster.remaining_tokens is not None
    expected = balance.decide(cluster, balance.AresSettings())
    resident, wide = cluster.resident_tokens.copy(), np.repeat(cluster.remaining_tokens, 2, axis=1)
    resident.flags.writeable = False
    same(balance.decide(replace(cluster, resident_tokens=resident), balance.AresSettings()), expected)
    same(balance.decide(replace(cluster, remaining_tokens=wide[:, ::2]), balance.AresSettings()), expected)
