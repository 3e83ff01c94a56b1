"""Rescue: who leaves an instance before its memory ends, and where to."""

from dataclasses import replace

import numpy as np

from ares.policy.rescue import NOWHERE, RescueSettings, rescue
from tests.policy.test_entrance import running

# A step takes 20 ms with full memory: 50 steps to come.
AHEAD = RescueSettings(lead_s=1.0, deviations=0.0, headroom=0.0)


def test_nobody_moves_while_there_is_room() -> None:
    assert rescue(running([(0, 400, 900), (0, 400, 900)], instances=2), AHEAD) == []
    assert rescue(running([]), AHEAD) == []


def test_the_smallest_that_is_enough_goes_where_it_fits() -> None:
    cluster = running([(0, 500, 900), (0, 300, 900), (0, 190, 900), (1, 100, 50)], instances=2)
    (one,) = rescue(cluster, AHEAD)
    # 990 tokens and three more a step: short of 150 or so after 50 steps, which the smallest brings.
    assert (one.request, one.source, one.target) == (2, 0, 1)
    assert "decode-0 lacks" in one.reason


def test_one_that_ends_before_is_left_alone() -> None:
    rows = [(0, 500, 900.0), (0, 300, 900.0), (0, 190, 10.0), (1, 100, 50.0)]
    assert rescue(running(rows, instances=2), AHEAD) == []
    rows[0] = (0, 680, 900.0)
    (one,) = rescue(running(rows, instances=2), AHEAD)
    assert one.request == 1


def test_where_nothing_fits_it_is_suspended() -> None:
    cluster = running([(0, 500, 900), (0, 490, 900), (1, 900, 900)], instances=2)
    (one,) = rescue(cluster, AHEAD)
    assert (one.request, one.target) == (1, NOWHERE)
    assert "suspended" in one.reason


def test_a_request_alone_and_one_that_cannot_move_stay() -> None:
    assert rescue(running([(0, 990, 900)], instances=2), AHEAD) == []
    cluster = running([(0, 500, 900), (0, 490, 900)], instances=2)
    assert rescue(replace(cluster, movable=np.zeros(2, np.bool_)), AHEAD) == []


def test_two_in_need_do_not_take_each_others() -> None:
    cluster = running([(0, 500, 900), (0, 490, 900), (1, 500, 900), (1, 490, 900)], instances=2)
    assert [one.target for one in rescue(cluster, AHEAD)] == [NOWHERE, NOWHERE]
    third = running([(0, 500, 900), (0, 400, 900), (1, 500, 900), (1, 400, 900), (2, 10, 9)], instances=3)
    assert sorted(one.target for one in rescue(third, replace(AHEAD, lead_s=2.0))) == [NOWHERE, 2]


def test_the_block_that_may_be_begun_is_kept_free() -> None:
    cluster = running([(0, 400, 900), (0, 440, 900), (1, 100, 50)], instances=2)
    assert rescue(cluster, AHEAD) == []
    (one,) = rescue(cluster, replace(AHEAD, margin_tokens=128))
    assert (one.request, one.target) == (0, 1)
