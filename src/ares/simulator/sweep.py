"""Loads x presets x seeds, over processes, and the means with their confidence intervals."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import numpy as np
from scipy import stats

from ares.simulator.metrics import summary
from ares.simulator.scenario import Scenario, run


def _one(scenario: Scenario, name: str, load: float, seed: int, slo_ttft: float, slo_tpot: float) -> dict[str, Any]:
    outcome, _ = run(scenario, name, load, None, seed)
    return summary(outcome, load, slo_ttft, slo_tpot) | {"seed": seed}


def sweep(
    scenario: Scenario,
    presets: list[str],
    loads: list[float],
    seeds: int,
    slo_ttft: float,
    slo_tpot: float,
    processes: int,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """Run everything; entries come back in the order of load, preset and seed whatever finished first."""
    jobs = [
        (scenario, name, load, seed, slo_ttft, slo_tpot) for load in loads for name in presets for seed in range(seeds)
    ]
    if processes == 1:
        runs = []
        for job in jobs:
            runs.append(_one(*job))
            advance()
        return runs
    # Compiled code and threads do not survive a fork well; a fresh interpreter finds the compiled code in the cache.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(_one, *job) for job in jobs]
        for _ in as_completed(futures):
            advance()
        return [future.result() for future in futures]


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % confidence interval (Student's t); 0 wide for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, 0.0
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


_OF_CLASSES = ("requests", "goodput_rps", "slo_share")
_SCALARS = (
    "goodput_rps",
    "slo_share",
    "throughput_rps",
    "preemptions",
    "oom_events",
    "migrations",
    "migrated_bytes",
    "imbalance",
    "longest_wait_s",
)


def points(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average the runs of each preset at each load; `<field>_ci` is the half width of the interval."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for entry in runs:
        groups.setdefault((entry["load"], entry["preset"]), []).append(entry)
    result = []
    for (load, name), entries in groups.items():
        point: dict[str, Any] = {"preset": name, "load": load, "seeds": len(entries)} | _means(entries, _SCALARS)
        classes = {one: None for entry in entries for one in entry.get("classes", {})}
        if classes:
            parts = {one: [entry["classes"][one] for entry in entries if one in entry["classes"]] for one in classes}
            point["classes"] = {one: _means(found, _OF_CLASSES) for one, found in parts.items()}
        result.append(point)
    return result


def _means(entries: list[dict[str, Any]], scalars: tuple[str, ...]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for measure in ("ttft_s", "tpot_s", "longest_gap_s"):
        result[measure] = {}
        for statistic in ("mean", "p50", "p90", "p99"):
            mean, half = interval([entry[measure][statistic] for entry in entries])
            result[measure][statistic], result[measure][f"{statistic}_ci"] = mean, half
    for field in scalars:
        result[field], result[f"{field}_ci"] = interval([entry[field] for entry in entries])
    return result
