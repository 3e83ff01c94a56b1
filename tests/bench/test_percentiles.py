"""One definition of percentiles."""

import pytest

from ares.bench.percentiles import median_interval, milliseconds, percentiles


def test_percentiles_are_interpolated() -> None:
    assert percentiles([], 50) == {}
    assert percentiles([3.0], 50, 99, 100) == {"p50": 3.0, "p99": 3.0, "max": 3.0}
    assert percentiles([4.0, 1.0, 2.0, 3.0], 50, 90, 100) == pytest.approx({"p50": 2.5, "p90": 3.7, "max": 4.0})
    assert milliseconds([0.0011, 0.0022], 0, 100) == {"p0": 1.1, "max": 2.2}


def test_an_interval_holds_its_median_and_is_always_the_same() -> None:
    values = [1.0, 1.1, 0.9, 1.3, 1.05, 0.97]
    found = median_interval(values)
    assert found["low"] < found["median"] < found["high"]
    assert found["median"] == pytest.approx(1.025)
    assert median_interval(values) == found
