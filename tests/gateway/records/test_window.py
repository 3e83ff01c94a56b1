"""The sliding windows behind the percentiles of the status."""

import pytest

from ares.gateway.records.window import Recent, Window


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_values_leave_the_window_when_they_are_old() -> None:
    clock = Clock()
    window = Window(10, 100, clock)
    window.add(1.0)
    clock.now += 6
    window.add(2.0)
    assert window.values() == [1.0, 2.0]
    clock.now += 5
    assert window.values() == [2.0]
    clock.now += 60
    assert window.values() == []


def test_the_window_holds_no_more_than_its_limit() -> None:
    window = Window(10, 3, Clock())
    for value in range(10):
        window.add(value)
    assert window.values() == [7, 8, 9]


def test_summary() -> None:
    recent = Recent()
    assert recent.summary()["ttft_s"] == {"count": 0, "p50": None, "p90": None, "p99": None}
    assert recent.summary()["prediction_error_tokens"]["bias"] is None
    for value in range(1, 102):
        recent.ttft_s.add(value)
    for error in (-30.0, 10.0, 20.0):
        recent.prediction_error_tokens.add(error)
    summary = recent.summary()
    assert summary["ttft_s"] == {"count": 101, "p50": 51.0, "p90": 91.0, "p99": 100.0}
    assert summary["tpot_s"]["count"] == 0
    error = summary["prediction_error_tokens"]
    assert (error["count"], error["mean_absolute"], error["bias"]) == (3, 20.0, pytest.approx(0.0))
