"""Metrics of a run: TTFT, TPOT, goodput, throughput, imbalance; and the definition of load."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ares
from ares.simulator.cluster import Outcome
from ares.simulator.profile import Profile
from ares.traces import Workload

FloatArray = NDArray[np.float64]


def capacity_rps(work: Workload, decode: Sequence[Profile], prefill: Sequence[Profile]) -> float:
    """Return the requests per second at which the cluster would be exactly full, in the fluid limit.

    A request of o output tokens occupies v = o (n + (o - 1) / 2) token-steps of KV. An instance with every token of
    its KV in use (or every slot, if those run out first) runs b = min(C o / v, slots) requests at once, each of which
    takes o steps. No policy can exceed this rate for long; load 1.0 is this rate.
    """
    output, memory_time = float(work.output_tokens.mean()), float(work.memory_time.mean())
    resident = memory_time / output
    rate = 0.0
    for profile in decode:
        batch = min(profile.kv_tokens / resident, profile.max_num_seqs)
        model = profile.step
        step = model.base_s + model.per_request_s * batch + model.per_resident_token_s * batch * resident
        if not prefill:  # the instance computes the prompts too
            step += batch / output * model.per_prefill_token_s * float(work.prompt_tokens.mean())
        rate += batch / (output * step)
    if prefill:
        prompt = work.prompt_tokens.astype(np.float64)
        each = [
            float(
                np.mean(
                    p.step.base_s + p.step.per_prefill_token_s * prompt + p.step.per_prefill_context_s * prompt**2 / 2
                )
            )
            for p in prefill
        ]
        rate = min(rate, sum(1.0 / seconds for seconds in each))
    return rate


def slo_share_bound(work: Workload, load: float) -> float:
    """Return the largest share of requests that any policy could serve at this load, in the fluid limit.

    A policy that knew all lengths would leave out the requests with the largest memory-time until the others fit. Work
    after the last arrival is not counted, which matters only where the trace spans a few request lifetimes.
    """
    if load <= 1.0:
        return 1.0
    memory_times = np.cumsum(np.sort(work.memory_time))
    return float(np.searchsorted(memory_times, memory_times[-1] / load, side="right") / len(work))


def ttft_s(outcome: Outcome) -> FloatArray:
    """Time to first token with every wait, that for decode included, shape (R,)."""
    return outcome.first_token_s - outcome.workload.arrival_s


def tpot_s(outcome: Outcome) -> FloatArray:
    """Time per output token, (E2E - TTFT) / (output tokens - 1), 0 for single tokens, shape (R,)."""
    output = outcome.workload.output_tokens
    time_per_token: FloatArray = (outcome.finish_s - outcome.first_token_s) / np.maximum(output - 1, 1)
    return time_per_token


def longest_gap_s(outcome: Outcome) -> FloatArray:
    """Longest time between two tokens of each stream, shape (R,): its longest stop, or its mean where it has none."""
    gaps: FloatArray = np.maximum(outcome.longest_gap_s, tpot_s(outcome))
    return gaps


def summary(outcome: Outcome, load: float, slo_ttft: float, slo_tpot: float) -> dict[str, Any]:
    """Return one entry of `runs` as the command line writes it.

    Rates are over the span of the arrivals: after it, while the last long requests run, there is nothing left to do.
    Throughput counts the requests completed in that span.
    """
    work = outcome.workload
    first, each, gaps = ttft_s(outcome), tpot_s(outcome), longest_gap_s(outcome)
    span = max(float(work.arrival_s[-1] - work.arrival_s[0]), 1e-9)
    state, plain = outcome.state, outcome.class_of == 0
    good = first <= np.where(plain, slo_ttft, state.ttft)
    good &= (each <= np.where(plain, slo_tpot, state.tpot)) & (gaps <= state.gap)
    during = outcome.sample_s <= span
    use = outcome.kv_use[during] if during.any() else outcome.kv_use
    mean = np.maximum(use.mean(axis=1), 1e-9)
    decisions = outcome.decision_s

    def judged(members: NDArray[np.bool_]) -> dict[str, Any]:
        several = members & (work.output_tokens > 1)
        return {
            "requests": int(members.sum()),
            "ttft_s": percentiles(first[members]),
            "tpot_s": percentiles(each[several] if several.any() else each[members]),
            "longest_gap_s": percentiles(gaps[members]),
            "goodput_rps": float(good[members].sum() / span),
            "slo_share": float(good[members].mean()),
        }

    every = np.ones(len(work), np.bool_)
    parts = {name: outcome.class_of == number for number, name in enumerate(outcome.classes)}
    by_class = {name: judged(members) for name, members in parts.items() if members.any()}
    return {
        "preset": outcome.preset,
        "load": load,
        **judged(every),
        "completed": int(np.isfinite(outcome.finish_s).sum()),
        "slo_share_bound": slo_share_bound(work, load),
        "throughput_rps": float((outcome.finish_s <= work.arrival_s[-1]).sum() / span),
        "preemptions": outcome.preemptions,
        "oom_events": outcome.oom_events,
        "migrations": outcome.migrations,
        "suspensions": outcome.suspensions,
        "migrated_bytes": outcome.migrated_bytes,
        **_cached(outcome),
        "imbalance": float((use.std(axis=1) / mean).mean()),
        "longest_wait_s": float(first.max()),
        "decision_ms": {"p50": float(np.median(decisions) * 1e3), "p99": float(np.percentile(decisions, 99) * 1e3)}
        if len(decisions)
        else None,
        "simulated_s": outcome.simulated_s,
        "wall_s": outcome.wall_s,
        **({"classes": by_class} if len(outcome.classes) > 1 else {}),
    }


def _cached(outcome: Outcome) -> dict[str, dict[str, int]]:
    """Return what prefix caches have saved, in tokens, where there are any."""
    current = outcome.state.current
    if not outcome.state.parameters.cached_block_tokens:
        return {}
    names = ("prefill_cached_tokens", "pull_cached_tokens", "pull_tokens")
    return {"prefix_caches": {name: int(current[name]) for name in names}}


def percentiles(values: FloatArray) -> dict[str, float]:
    """Return the mean and three percentiles of a measure."""
    points = {name: float(np.percentile(values, q)) for name, q in (("p50", 50), ("p90", 90), ("p99", 99))}
    return points | {"mean": float(values.mean())}


def provenance() -> dict[str, Any]:
    """Versions, commit and machine of a measurement."""
    root = Path(ares.__file__).parent
    try:
        commit = subprocess.run(  # noqa: S603
            ["git", "-C", str(root), "describe", "--always", "--dirty"],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    return {
        "ares": ares.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "numba": version("numba"),
        "machine": f"{platform.system()} {platform.machine()}, {_cpu_model()}",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
