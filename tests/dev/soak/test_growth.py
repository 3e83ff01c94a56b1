"""What grows is found, and what only varies is not."""

import random
from typing import Any

import pytest

from ares_dev.soak.command import violations
from ares_dev.soak.growth import judge_growth, slope
from ares_dev.soak.samples import Sample

TIMES = [5.0 * n for n in range(361)]


def soaked(**series: Any) -> list[Sample]:
    """Half an hour of samples, every eighteenth at rest; each series is a function of the sample's number."""
    return [
        Sample(time, n % 18 == 0, {f"gateway/{name}": value(n) for name, value in series.items()})
        for n, time in enumerate(TIMES)
    ]


def judged(**series: Any) -> dict[str, Any]:
    (row,) = judge_growth(soaked(**series), TIMES[-1] / 2)
    return row


def test_a_slope_is_not_moved_by_outliers() -> None:
    noise = random.Random(3)
    values = [100 + 0.02 * time + noise.gauss(0, 3) for time in TIMES]
    assert slope(TIMES, values) == pytest.approx(0.02, rel=0.05)
    for n in noise.sample(range(len(values)), 40):
        values[n] = 10_000
    assert slope(TIMES, values) == pytest.approx(0.02, rel=0.15)


def test_a_slope_of_many_points_is_taken_from_some() -> None:
    times = [0.5 * n for n in range(20_000)]
    assert slope(times, [3 * time for time in times]) == pytest.approx(3.0)


def test_memory_that_leaks_is_found() -> None:
    noise = random.Random(5)
    leaking = judged(rss_mb=lambda n: 150 + 0.1 * n + noise.gauss(0, 4))  # 72 MB an hour
    assert leaking["flat"] is False
    assert leaking["growth"] == pytest.approx(18, rel=0.2)
    assert leaking["growth_per_hour"] == pytest.approx(72, rel=0.2)


def test_memory_that_warms_up_or_varies_is_flat() -> None:
    noise = random.Random(7)
    assert judged(rss_mb=lambda n: 150 + min(n, 150) + noise.gauss(0, 4))["flat"] is True
    assert judged(pss_mb=lambda n: 150 - 0.1 * n)["flat"] is True
    # A hundredth of a large process is within its bound.
    assert judged(rss_mb=lambda n: 2000 + 0.05 * n)["flat"] is True


def test_what_is_counted_one_by_one_is_judged_at_rest() -> None:
    busy = judged(kv_blocks_used=lambda n: 0 if n % 18 == 0 else n)
    assert (busy["flat"], busy["samples"], busy["median"]) == (True, 11, 0)
    assert judged(kv_blocks_used=lambda n: n // 60)["flat"] is False
    assert judged(descriptors=lambda n: 60 + n % 7)["flat"] is True
    assert judged(descriptors=lambda n: 60 + n // 9)["flat"] is False


def test_too_few_samples_are_no_verdict() -> None:
    samples = soaked(tasks=lambda n: n)[-19:]
    (row,) = judge_growth(samples, 0.0)
    assert (row["flat"], row["samples"]) == (None, 2)


def test_what_was_promised_and_not_kept_is_said() -> None:
    good: dict[str, Any] = {
        "broken_off": [],
        "outputs": {"right": 10},
        "failed": 0,
        "engine_faults": {"nixl_num_kv_expired_reqs": 0.0, "nixl_num_failed_transfers": 2.0},
        "left_at_the_end": {},
        "series": [{"series": "gateway/rss_mb", "flat": None}, {"series": "gateway/tasks", "flat": True}],
    }
    assert violations(good) == []
    bad = {
        "broken_off": ["decode-0 ended"],
        "outputs": {"right": 10, "lost": 1},
        "failed": 2,
        "engine_faults": {"nixl_num_kv_expired_reqs": 3.0},
        "left_at_the_end": {"decode-0/pinned": 1},
        "series": [{"series": "gateway/rss_mb", "flat": False, "growth": 20.0, "limit": 8.0}],
    }
    assert violations(bad) == [
        "broken off: decode-0 ended",
        "1 outputs lost",
        "2 requests failed",
        "3 leases expired",
        "left at the end: decode-0/pinned = 1",
        "gateway/rss_mb grows: 20, limit 8",
    ]
