"""The figures of a run, and the ratios of two presets, round by round."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ares.bench.live.client import Observed, Run
from ares.bench.percentiles import median_interval, percentiles


class Objectives(NamedTuple):
    """Seconds to the first token, of every further one, and of the longest gap of a stream (infinite: none)."""

    ttft_s: float
    tpot_s: float
    gap_s: float

    def met(self, seen: Observed) -> bool:
        """Whether a completed request met all of them."""
        return seen.ttft_s <= self.ttft_s and seen.tpot_s <= self.tpot_s and seen.longest_gap_s <= self.gap_s


def summarize(run: Run, slo: Objectives) -> dict[str, Any]:
    """Return the figures of one run; failed requests miss every objective and are in no percentile."""
    came = [seen for seen in run.requests if seen.error is None]
    tpot = [seen.tpot_s for seen in came if len(seen.tokens) > 1]
    good = sum(slo.met(seen) for seen in came)
    kv = np.array([sample["kv"] for sample in run.samples if sample["at_s"] <= run.span_s] or [[0.0]])
    stalls = [record["stall_s"] for record in run.migrations if record["outcome"] == "moved"]
    return {
        "preset": run.preset,
        "requests": len(run.requests),
        "failed": len(run.requests) - len(came),
        "ttft_s": _percentiles([seen.ttft_s for seen in came]),
        "tpot_s": _percentiles(tpot),
        "longest_gap_s": _percentiles([seen.longest_gap_s for seen in came]),
        "goodput_rps": good / run.span_s,
        "slo_share": good / len(run.requests),
        "output_tokens_per_s": sum(len(seen.tokens) for seen in came) / max((s.last_s for s in came), default=1.0),
        "preemptions": run.preemptions,
        "migrations": len(stalls),
        "migrations_that_failed": len(run.migrations) - len(stalls),
        "suspensions": run.suspensions,
        "stall_s": _percentiles(stalls) if stalls else None,
        "imbalance": float((kv.std(axis=1) / np.maximum(kv.mean(axis=1), 1e-9)).mean()),
        "most_kv": float(kv.max()),
        "over_time": {
            "at_s": [sample["at_s"] for sample in run.samples],
            "kv": [[round(share, 3) for share in sample["kv"]] for sample in run.samples],
            "waiting": [sample["waiting"] for sample in run.samples],
        },
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    return {**percentiles(values, 50, 90, 99), "mean": statistics.fmean(values)} if values else {}


_MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "ttft_p50": lambda one: float(one["ttft_s"]["p50"]),
    "ttft_p99": lambda one: float(one["ttft_s"]["p99"]),
    "tpot_p50": lambda one: float(one["tpot_s"]["p50"]),
    "tpot_p99": lambda one: float(one["tpot_s"]["p99"]),
    "longest_gap_p99": lambda one: float(one["longest_gap_s"]["p99"]),
    "goodput": lambda one: float(one["goodput_rps"]),
    "throughput": lambda one: float(one["output_tokens_per_s"]),
}


def ratios(rounds: list[dict[str, dict[str, Any]]], preset: str, baseline: str) -> dict[str, Any]:
    """Return what `preset` reached over what `baseline` did, paired by round: median, 95 % bootstrap interval, each."""
    result: dict[str, Any] = {"preset": preset, "baseline": baseline}
    for name, read in _MEASURES.items():
        pairs = [(read(one[preset]), read(one[baseline])) for one in rounds]
        each = [a / b for a, b in pairs if b > 0]
        if each:
            result[name] = median_interval(each) | {"rounds": each}
    return result


def differing(runs: list[Run]) -> list[str]:
    """Return the requests whose tokens are not the same in every run that completed them; greedy ones must be."""
    first: dict[str, list[int]] = {}
    wrong = set()
    for seen in (seen for run in runs for seen in run.requests if seen.error is None):
        if first.setdefault(seen.name, seen.tokens) != seen.tokens:
            wrong.add(seen.name)
    return sorted(wrong)
