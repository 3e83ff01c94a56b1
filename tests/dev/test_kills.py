"""When a stream resumed, from what its client saw."""

import pytest

from ares.bench.steady import latency_summary
from ares_dev.kills import resumed_after


def steps(start: float, count: int) -> list[float]:
    return [start + 0.03 * n for n in range(count)]


def test_what_was_in_flight_is_not_a_resumption() -> None:
    before, after = steps(8.0, 60), steps(10.4, 20)
    assert resumed_after([*before, *after], 10.0) == pytest.approx(0.4)
    assert resumed_after([*before, 10.002, 10.004, *after], 10.0) == pytest.approx(0.4)


def test_a_stream_that_never_resumed() -> None:
    assert resumed_after(steps(8.0, 60), 10.0) is None


def test_percentiles() -> None:
    assert latency_summary([]) == {"count": 0}
    assert latency_summary([n / 1000 for n in range(1, 101)]) == {
        "count": 100,
        "p50_ms": 50.5,
        "p90_ms": 90.1,
        "max_ms": 100.0,
    }
