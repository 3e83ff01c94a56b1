"""The time of an engine's steps, from their scheduling to their results."""

import pytest

from ares.engine.connector.step_times import StepTimes


def test_a_step_lasts_until_the_next_is_scheduled_behind_it() -> None:
    """Synchronous scheduling: what the engine does between two steps is part of the first, as a stream sees it."""
    times = StepTimes()
    for began in (0.0, 1.0, 2.0):
        times.scheduled(began, 4, 0)
        times.completed(began + 0.9, idle=False)
    assert times.totals.steps == 3
    assert times.totals.busy_s == pytest.approx(2.9)
    assert 0.9 < times.totals.step_time_s < 1.0


def test_idle_time_is_no_step() -> None:
    times = StepTimes()
    times.scheduled(0.0, 100, 100)
    times.completed(1.0, idle=True)
    times.scheduled(5.0, 50, 50)
    times.completed(6.0, idle=False)
    times.scheduled(6.0, 0, 0)  # the others wait for their KV
    times.completed(6.0, idle=False)
    times.scheduled(9.0, 1, 0)
    times.completed(9.5, idle=True)
    assert times.totals[:3] == (3, pytest.approx(2.5), 150)


def test_a_lone_prompt_counts_with_asynchronous_scheduling() -> None:
    """An empty step is scheduled while it runs, at once, and ends behind it."""
    times = StepTimes()
    for began in (0.0, 10.0):
        times.scheduled(began, 300, 300)
        times.scheduled(began + 0.001, 0, 0)
        times.completed(began + 2.0, idle=True)
        times.completed(began + 2.0, idle=True)
    assert times.totals[:3] == (2, pytest.approx(4.0), 600)


def test_steps_that_are_scheduled_ahead_are_counted_one_by_one() -> None:
    times = StepTimes()
    times.scheduled(0.0, 8, 0)
    for number in range(1, 11):
        times.scheduled(number - 1 + 0.1, 8, 0)
        times.completed(float(number), idle=False)
    assert times.totals == (10, pytest.approx(10.0), 0, pytest.approx(1.0))


def test_a_result_without_a_step_is_not_counted() -> None:
    times = StepTimes()
    times.completed(1.0, idle=True)
    assert times.totals.steps == 0
