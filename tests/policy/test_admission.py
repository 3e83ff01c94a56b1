"""Admission and order: who may enter, where, and how strictly."""

import numpy as np
import pytest

from ares.policy.admission import memory_time
from ares.policy.admission.loop import choose_instance
from ares.policy.dispatch.least_loaded import least_loaded_choice
from ares.policy.dispatch.round_robin import round_robin_choice


def choose(expected: list[list[float]], own: list[float], **changes: object) -> int:
    arrays = {
        "expected": np.asarray(expected, float),
        "variance": np.zeros((len(expected), len(own))),
        "limit": np.full(len(expected), 1000, np.int64),
        "closed": np.zeros(len(expected), np.int64),
        "cached": np.zeros(0, np.int64),
        "cached_weight": 1.0,
        "own_mean": np.asarray(own, float),
        "own_variance": np.zeros(len(own)),
        "points": len(own),
        "deviations": 0.0,
        "headroom": 0.0,
    }
    return choose_instance(**(arrays | changes))  # type: ignore[arg-type]


def test_the_peak_decides_not_the_present() -> None:
    growing, shrinking = [100.0, 950.0], [600.0, 100.0]
    assert choose([growing, shrinking], [100.0, 100.0]) == 1
    assert choose([growing, shrinking], [100.0, 100.0], points=1) == 0


def test_nobody_enters_where_the_peak_does_not_fit() -> None:
    assert choose([[950.0], [960.0]], [100.0]) == -1
    assert choose([[950.0], [800.0]], [100.0]) == 1
    assert choose([[950.0], [800.0]], [100.0], headroom=0.15) == -1
    assert choose([[950.0], [800.0]], [100.0], closed=np.array([0, 1])) == -1


def test_uncertainty_counts() -> None:
    assert choose([[800.0]], [100.0], variance=np.array([[10_000.0]]), deviations=0.5) == 0
    assert choose([[800.0]], [100.0], variance=np.array([[10_000.0]]), deviations=1.5) == -1


def test_what_is_cached_counts_as_much_as_room_where_the_request_fits() -> None:
    one, other = [600.0], [550.0]
    assert choose([one, other], [100.0]) == 1
    assert choose([one, other], [100.0], cached=np.array([60, 0])) == 0
    assert choose([one, other], [100.0], cached=np.array([40, 0])) == 1
    assert choose([one, other], [100.0], cached=np.array([40, 0]), cached_weight=2.0) == 0
    assert choose([one, other], [100.0], cached=np.array([60, 0]), cached_weight=0.0) == 1
    assert choose([[950.0], [800.0]], [100.0], cached=np.array([100, 0])) == 1, "it must fit"
    assert choose([[950.0], [960.0]], [100.0], cached=np.array([100, 100])) == -1
    assert choose([one, other], [100.0], cached=np.array([60, 0]), closed=np.array([1, 0])) == 1


def test_an_empty_instance_takes_any_request_whatever_is_cached() -> None:
    empty, used = [0.0], [50.0]
    assert choose([empty, used], [100.0], cached=np.array([0, 60])) == 1
    assert choose([used, empty], [100.0], cached=np.array([60, 0])) == 0
    assert choose([empty, used], [100.0], cached=np.array([0, 40])) == 0
    assert choose([used, empty], [5000.0], cached=np.array([60, 0])) == 1
    assert choose([empty, used], [5000.0], cached=np.array([0, 60])) == 0


def test_an_instance_whose_memory_is_unknown_takes_what_others_do_not() -> None:
    """Without telemetry it counts as empty, and may still be thought to have the beginning of a request cached."""
    unknown, known = np.array([0]), np.array([0, 1000])
    assert choose([[0.0]], [100.0], cached=np.array([60]), limit=unknown) == 0
    assert choose([[0.0], [50.0]], [100.0], cached=np.array([60, 0]), limit=known) == 1
    assert choose([[0.0], [950.0]], [100.0], cached=np.array([60, 0]), limit=known) == 0


def test_memory_time() -> None:
    """Token-steps until the end: the sum of n, n + 1, ... over p steps, to first order."""
    assert memory_time(500.0, 1000.0) == pytest.approx(sum(500 + k for k in range(1000)), rel=1e-3)


def test_choices_skip_the_closed() -> None:
    closed = np.array([1, 0, 0])
    assert round_robin_choice(0, closed) == 1
    assert round_robin_choice(3, closed) == 1
    assert round_robin_choice(0, np.ones(3, np.int64)) == -1
    load, capacity = np.array([0, 500, 500]), np.array([1000, 1000, 2000])
    assert least_loaded_choice(load, capacity, closed, 10) == 2
    assert least_loaded_choice(load, capacity, np.ones(3, np.int64), 10) == -1
