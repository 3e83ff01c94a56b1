"""What runs are judged by."""

import math
from dataclasses import replace
from typing import Any

import pytest

from ares.bench.live import summary
from ares.bench.live.client import Observed, Run


def seen(name: str, at: float, first: float, last: float, tokens: list[int], error: str | None = None) -> Observed:
    return Observed(name, at, tokens, 10, first, last, 0.1, error)


def run(preset: str, requests: list[Observed], **changes: Any) -> Run:
    usual: dict[str, Any] = {
        "samples": [{"at_s": 1.0, "kv": [0.5, 0.1], "running": [1, 1], "waiting": 0, "suspended": 0}],
        "preemptions": 3,
        "migrations": [{"outcome": "moved", "stall_s": 0.2}, {"outcome": "finished_first", "stall_s": None}],
        "suspensions": 1,
        "span_s": 10.0,
    }
    return Run(preset, requests, **(usual | changes))


def test_a_summary_counts_what_failed_as_missed() -> None:
    requests = [
        seen("fast", 1.0, 1.5, 2.5, [1] * 11),  # TTFT 0.5, TPOT 0.1
        seen("slow", 2.0, 2.5, 6.5, [1] * 11),  # TPOT 0.4
        seen("late", 3.0, 9.0, 10.0, [1] * 11),  # TTFT 6
        seen("failed", 4.0, 0.0, 0.0, [], "503"),
    ]
    figures = summary.summarize(run("x", requests), summary.Objectives(1.0, 0.2, math.inf))
    assert figures["failed"] == 1
    assert figures["slo_share"] == 0.25
    assert figures["goodput_rps"] == pytest.approx(0.1)
    assert figures["tpot_s"]["p50"] == pytest.approx(0.1)
    assert figures["ttft_s"]["p99"] == pytest.approx(5.89)
    assert (figures["migrations"], figures["migrations_that_failed"]) == (1, 1)
    assert figures["imbalance"] == pytest.approx(0.2 / 0.3)


def test_a_stream_that_stood_still_for_too_long_misses_its_objective() -> None:
    quick = seen("quick", 1.0, 1.5, 2.5, [1] * 11)
    requests = [quick, replace(quick, longest_gap_s=2.5)]
    figures = summary.summarize(run("x", requests), summary.Objectives(1.0, 0.2, 2.0))
    assert (figures["slo_share"], figures["goodput_rps"]) == (0.5, pytest.approx(0.1))
    assert summary.summarize(run("x", requests), summary.Objectives(1.0, 0.2, math.inf))["slo_share"] == 1.0


def test_a_run_where_everything_failed_has_a_summary() -> None:
    failed = run("x", [seen("a", 0.0, 0.0, 0.0, [], "503")], samples=[], migrations=[])
    figures = summary.summarize(failed, summary.Objectives(1.0, 1.0, 1.0))
    assert figures["slo_share"] == 0.0
    assert figures["tpot_s"] == {}


def test_presets_are_compared_within_a_round() -> None:
    rounds, slo = [], summary.Objectives(99.0, 99.0, 99.0)
    for scale in (1.0, 3.0, 10.0):  # the machine is slower each time, for both
        a = summary.summarize(run("a", [seen("r", 0.0, 1.0 * scale, 2.0 * scale, [1] * 11)]), slo)
        b = summary.summarize(run("b", [seen("r", 0.0, 0.5 * scale, 0.75 * scale, [1] * 11)]), slo)
        rounds.append({"a": a, "b": b})
    ratios = summary.ratios(rounds, "b", "a")
    assert ratios["ttft_p50"]["rounds"] == pytest.approx([0.5] * 3)
    assert ratios["tpot_p99"]["median"] == ratios["tpot_p99"]["low"] == pytest.approx(0.25)


def test_tokens_that_differ_are_named() -> None:
    one = run("a", [seen("same", 0, 1, 2, [1, 2]), seen("other", 0, 1, 2, [1, 2])])
    two = run("b", [seen("same", 0, 1, 2, [1, 2]), seen("other", 0, 1, 2, [1, 3]), seen("new", 0, 1, 2, [4])])
    assert summary.differing([one, two]) == ["other"]
    broken = run("c", [seen("same", 0, 1, 2, [1], "broke")])
    assert summary.differing([one, broken]) == []
