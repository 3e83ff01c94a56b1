"""Out-of-memory avoidance: which request leaves an instance before its memory is full, and where to."""

from dataclasses import replace

import numpy as np

from ares.policy import Cluster
from ares.policy.oom_avoidance import NO_TARGET, OomAction, OomAvoidanceSettings, avoid_oom
from tests.policy.test_admission_forecast import progress, running

# A step takes 20 ms with full memory: 50 steps to come.
AHEAD = OomAvoidanceSettings(lookahead_s=1.0, deviations=0.0, headroom=0.0)


def decide(cluster: Cluster, settings: OomAvoidanceSettings = AHEAD) -> list[OomAction]:
    """All requests stand alike."""
    return avoid_oom(cluster, settings, progress(len(cluster.location)))


def test_nobody_moves_while_there_is_room() -> None:
    assert decide(running([(0, 400, 900), (0, 400, 900)], instances=2)) == []
    assert decide(running([])) == []


def test_the_smallest_that_is_enough_goes_where_it_fits() -> None:
    cluster = running([(0, 500, 900), (0, 300, 900), (0, 190, 900), (1, 100, 50)], instances=2)
    (one,) = decide(cluster)
    # 990 tokens and three more a step: short of 150 or so after 50 steps, which the smallest brings.
    assert (one.request, one.source, one.target) == (2, 0, 1)
    assert "decode-0 lacks" in one.reason


def test_one_that_ends_before_is_left_alone() -> None:
    rows = [(0, 500, 900.0), (0, 300, 900.0), (0, 190, 10.0), (1, 100, 50.0)]
    assert decide(running(rows, instances=2)) == []
    rows[0] = (0, 680, 900.0)
    (one,) = decide(running(rows, instances=2))
    assert one.request == 1


def test_where_nothing_fits_it_is_suspended() -> None:
    cluster = running([(0, 500, 900), (0, 490, 900), (1, 900, 900)], instances=2)
    (one,) = decide(cluster)
    assert one.target == NO_TARGET
    assert "can be suspended" in one.reason


def test_a_request_alone_and_one_that_cannot_move_stay() -> None:
    assert decide(running([(0, 990, 900)], instances=2)) == []
    cluster = running([(0, 500, 900), (0, 490, 900)], instances=2)
    assert decide(replace(cluster, movable=np.zeros(2, np.bool_))) == []


def test_a_request_that_an_operator_has_moved_leaves_where_memory_runs_out() -> None:
    cluster = running([(0, 500, 900), (0, 300, 900), (0, 190, 900), (1, 100, 50)], instances=2)
    commanded = np.array([False, False, True, False])
    view = replace(cluster, movable=cluster.movable & ~commanded, commanded=commanded)
    assert decide(view) == decide(cluster)
    assert [one.request for one in decide(replace(view, commanded=None))] == [1]


def test_two_in_need_do_not_take_each_others() -> None:
    cluster = running([(0, 500, 900), (0, 490, 900), (1, 500, 900), (1, 490, 900)], instances=2)
    assert [one.target for one in decide(cluster)] == [NO_TARGET, NO_TARGET]
    third = running([(0, 500, 900), (0, 400, 900), (1, 500, 900), (1, 400, 900), (2, 10, 9)], instances=3)
    assert sorted(one.target for one in decide(third, replace(AHEAD, lookahead_s=2.0))) == [NO_TARGET, 2]


def test_where_nothing_fits_the_one_with_most_slack_is_suspended() -> None:
    cluster = running([(0, 500, 900), (0, 490, 900), (1, 900, 900)], instances=2)
    # 500 tokens in 5 s at 100 ms a token have saved 45 s, 40 tokens in 3.5 s half a second.
    stand = progress(3, generated=[500, 40, 10], elapsed_s=[5.0, 3.5, 1.0])
    (one,) = avoid_oom(cluster, AHEAD, stand)
    assert (one.request, one.target) == (0, NO_TARGET)
    late = progress(3, generated=[500, 40, 10], elapsed_s=[5.0, 3.5, 1.0], age_s=[5.0, 6.5, 1.0])
    assert avoid_oom(cluster, AHEAD, late)[0].request == 1


def test_one_without_a_prediction_has_no_slack() -> None:
    cluster = running([(0, 500, 900), (0, 490, 900), (1, 900, 900)], instances=2)
    assert cluster.remaining_tokens is not None
    stand = progress(3, generated=[500, 40, 10], elapsed_s=[5.0, 3.5, 1.0])
    # Where none is predicted, the smallest that is enough.
    for unknown, suspended in (([0], 1), ([0, 1], 1), ([1], 0)):
        remaining = cluster.remaining_tokens.copy()
        remaining[unknown] = np.nan
        (one,) = avoid_oom(replace(cluster, remaining_tokens=remaining), AHEAD, stand)
        assert (one.request, one.target) == (suspended, NO_TARGET)


def test_of_those_whose_gap_would_be_missed_the_largest_is_suspended_unless_one_is_missed_already() -> None:
    cluster = running([(0, 480, 900), (0, 510, 900), (1, 900, 900)], instances=2)
    brief = progress(3, generated=[500, 500, 10], elapsed_s=[5.0, 5.0, 1.0], gap_s=[2.0, 2.0, 2.0])
    (one,) = avoid_oom(cluster, AHEAD, brief)
    assert (one.request, one.target) == (1, NO_TARGET)
    assert avoid_oom(cluster, AHEAD, replace(brief, longest_gap_s=np.array([3.0, 0.0, 0.0])))[0].request == 0
