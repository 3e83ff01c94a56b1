"""The rules of others, on clusters that can be worked out by hand or by trying everything."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ares.policy import Candidates, Cluster, admission_policy, decide_admissions, dispatcher
from ares.policy.admission.past_future import PastFuture, PastFutureSettings, future_peak
from ares.policy.admission.pausing import PausingSettings
from ares.policy.dispatch.balanceroute import BalanceRouteSettings, score
from tests.policy.test_admission_forecast import progress, running, waiting

# --- balanceroute ---


@given(
    loads=st.lists(st.integers(0, 100), min_size=2, max_size=5),
    tokens=st.integers(1, 200),
)
def test_the_score_is_what_an_admission_takes_off_the_idle_work_of_a_step(loads: list[int], tokens: int) -> None:
    def idle(each: list[int]) -> int:
        return sum(max(each) - load for load in each)

    margin = np.array([[float(max(loads) - load)] for load in loads])
    scores = score(margin, np.array([float(tokens)]), len(loads))[:, 0]
    for place in range(len(loads)):
        after = [load + tokens * (n == place) for n, load in enumerate(loads)]
        assert scores[place] == idle(loads) - idle(after)


def test_balanceroute_looks_ahead() -> None:
    """Instance 0 holds most, and ends in ten steps; instance 1 goes on for long."""
    view = running([(0, 500, 10.0), (1, 400, 1000.0)], instances=2, capacity=10_000)
    left = np.array([300.0] * 3)
    now = dispatcher("balanceroute", BalanceRouteSettings(lookahead=0))
    assert now.choose(view, 50, left) == 1
    assert dispatcher("balanceroute").choose(view, 50, left) == 0
    # Hand-computed for 0, 1 and 100 steps ahead: loads (500, 400), (501, 401) and (0, 500), the request 50, 51 and 150.
    # F(0) = -50 - 51 g + 150 g^100 = -F(1): 21.9 with g = 0.998, and -45.6 with g = 0.99.
    slowly = BalanceRouteSettings(lookahead=100, points=3, discount=0.998)
    assert dispatcher("balanceroute", slowly).choose(view, 50, left) == 0
    fast = BalanceRouteSettings(lookahead=100, points=3, discount=0.99)
    assert dispatcher("balanceroute", fast).choose(view, 50, left) == 1


def test_of_equal_scores_the_smallest_load_takes_it() -> None:
    view = running([(0, 500, 900.0), (1, 300, 900.0), (2, 100, 900.0)], instances=3, capacity=10_000)
    assert dispatcher("balanceroute").choose(view, 10, None) == 2
    assert dispatcher("balanceroute").choose(replace(view, open=np.array([True, True, False])), 10, None) == 1


# --- past-future ---


@given(rows=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 30)), min_size=1, max_size=6))
def test_the_peak_is_the_largest_of_all_future_moments(rows: list[tuple[int, int]]) -> None:
    tokens, left = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    memory = [sum(n + k for n, p in rows if p >= k) for k in range(31)]
    assert future_peak(tokens, left) == max(memory)


def past(*lengths: int, **settings: Any) -> PastFuture:
    policy = PastFuture(PastFutureSettings(**({"reserve": 0.0} | settings)))
    for length in lengths:
        policy.learn(length)
    return policy


def test_lengths_are_drawn_from_longer_outputs_of_the_past() -> None:
    policy = past(10, 20, 30, 40)
    drawn = {policy.left(f"r{n}", 15, draw) for n, draw in itertools.product(range(50), range(3))}
    assert drawn == {5.0, 15.0, 25.0}
    assert policy.left("r1", 15, 0) == past(40, 30, 20, 10).left("r1", 15, 0), "whatever the order"
    assert policy.left("r1", 100, 0) == pytest.approx(10.0), "1.1 times as long as now"
    assert past().left("r1", 0, 0) == 2048.0
    forgetful = past(10, 20, 30, 40, remembered=1)
    assert {forgetful.left(f"r{n}", 0, 0) for n in range(20)} == {40.0}


def entries(policy: Any, view: Cluster, outside: Candidates, generated: list[int] | None = None) -> list[Any]:
    stand = progress(len(view.location), **({"generated": generated} if generated is not None else {}))
    return [(one.kind, one.index, one.instance) for one in decide_admissions(policy, view, outside, stand)]


def test_past_future_is_first_come_first_served_up_to_the_peak() -> None:
    # Every output has 100 tokens. On instance 0 a request of 500 has 60 left, so the peak with a new one of 300 is
    # max(300 + 100, 500 + 300 + 2 * 60) = 920; on instance 1 it is 800 + 300 + 2 * 100 = 1300.
    view = running([(0, 500, 1.0), (1, 800, 1.0)], instances=2)
    policy = past(100, 100)
    outside = waiting([300, 10, 10], [1.0] * 3, [3.0, 2.0, 1.0])
    assert entries(policy, view, outside, [40, 0])[0] == ("admit", 0, 0)
    # With 450 tokens the peak is 1070: it fits nowhere, and who came later waits behind it.
    assert entries(policy, view, waiting([450, 10], [1.0] * 2, [3.0, 2.0]), [40, 0]) == []
    assert entries(policy, view, waiting([450, 10], [1.0] * 2, [2.0, 3.0]), [40, 0]) == [("admit", 1, 0)]
    assert entries(past(100, reserve=0.1), view, waiting([300], [1.0]), [40, 0]) == []
    # What is too large for any instance enters an empty one: it could wait for ever.
    assert entries(policy, running([], instances=2), waiting([950], [1.0])) == [("admit", 0, 0)]


# --- pausing ---


def test_pausing_lets_in_what_fits_where_it_is_assigned() -> None:
    view = running([(0, 600, 1.0), (1, 500, 1.0)], instances=2)
    policy = admission_policy("pausing")
    assert entries(policy, view, waiting([100], [1.0])) == [("admit", 0, 1)]
    # 550 tokens fit nowhere; who came later to the same instance waits behind.
    assert entries(policy, view, waiting([550, 450], [1.0] * 2, [2.0, 1.0])) == []


@pytest.mark.parametrize("name", ["pausing", "past-future", "forecast"])
def test_without_instances_nobody_is_let_in(name: str) -> None:
    view = running([], instances=0)
    assert decide_admissions(admission_policy(name), view, waiting([100], [1.0]), progress(0)) == []


def test_pausing_pauses_where_the_cluster_gains_and_resumes_there() -> None:
    # Loads 900 and 300: 3 tokens in 19 ms, and without the largest request 2 in 13 ms, which is fewer a second. Where
    # a step takes 1 ms and 10 us a token: 3 in 10 ms before, 2 in 4 ms after; without the other one 2 in 7 ms.
    rows = [(0, 600, 1.0), (0, 300, 1.0), (1, 300, 1.0)]
    quick = {"step_base_s": np.full(2, 0.001), "step_token_s": np.full(2, 1e-5)}
    policy = admission_policy("pausing", PausingSettings(threshold=0.2))
    assert entries(policy, running(rows, instances=2), waiting([], [])) == []
    view = running(rows, instances=2, **quick)
    assert entries(policy, view, waiting([], [])) == [("suspend", 0, 0)]
    unable = replace(view, movable=np.array([False, True, True]))
    assert entries(admission_policy("pausing"), unable, waiting([], [])) == []
    # It runs again on its own instance, though the other one holds as much, once that lets the cluster gain.
    out = replace(waiting([600], [1.0]), requests=("row-0",), suspended=np.array([True]))
    after = replace(running([(0, 300, 1.0), (1, 300, 1.0)], instances=2, **quick), requests=("row-1", "row-2"))
    assert entries(policy, after, out) == [], "it would be paused at once"
    alone = replace(running([(1, 500, 1.0)], instances=2, **quick), requests=("row-2",))
    assert entries(policy, alone, out) == [("resume", 0, 0)]


def test_pausing_exchanges_before_it_drops() -> None:
    # Instance 0 runs 600 + 300, and 100 wait there: with 600 exchanged for 100 all loads are 400.
    view = running([(0, 600, 1.0), (0, 300, 1.0), (1, 400, 1.0)], instances=2)
    policy = admission_policy("pausing", PausingSettings(threshold=0.05))
    full = replace(view, capacity_tokens=np.array([950, 1000]))
    outside = replace(waiting([100], [1.0]), excluded=np.array([[False, True]]))
    assert entries(policy, full, outside) == [("suspend", 0, 0), ("admit", 0, 0)]
