"""The simulator asked what these runs would be, from the laws that the gateway had fitted by their end."""

from typing import Any

import numpy as np

from ares.bench.live.client import Run
from ares.bench.live.judge import Objectives, PrefillLaw, lengths
from ares.policy import preset
from ares.simulator import metrics
from ares.simulator.cluster import Simulation
from ares.simulator.errors import ERROR_MODELS
from ares.simulator.profile import Profile, StepLaw
from ares.traces import Workload


def profile_of(run: Run, decode: dict[str, Any], prefill: PrefillLaw, name: str) -> Profile | None:
    """Return what the simulator needs to know of a decode instance; None where its law is not known yet."""
    law = run.laws.get(decode["name"])
    if law is None:
        return None
    return Profile(
        name=name,
        model="recorded",
        source="fitted online by the gateway",
        kv_tokens=decode["capacity_tokens"],
        kv_bytes_per_token=1,
        block_size=decode["capacity_tokens"] // decode["kv_blocks"],
        max_num_seqs=256,
        step=StepLaw(
            base_s=max(law[0], 1e-6),
            per_request_s=law[1],
            per_resident_token_s=law[2],
            per_prefill_token_s=prefill.token_s,
        ),
        bandwidth_bytes_s=1e9,
    )


def predicted(run: Run, instances: list[dict[str, Any]], law: PrefillLaw, slo: Objectives) -> dict[str, Any] | None:
    """Simulate one run with its own arrivals and lengths, under these objectives.

    Errors are relative to what was measured.
    """
    came = lengths(run)
    decode = [row for row in instances if row["role"] != "prefill"]
    profiles = [profile_of(run, row, law, row["name"]) for row in decode]
    known = [profile for profile in profiles if profile is not None]
    if len(known) < len(profiles) or len(came) < 2:
        return None
    work = Workload(
        run.preset,
        np.array([seen.at_s for seen in came]),
        np.array([max(seen.prompt_tokens, 1) for seen in came], np.int64),
        np.array([len(seen.tokens) for seen in came], np.int64),
    )
    step = known[0].step.model_copy(update={"base_s": law.base_s})
    prefilling = known[0].model_copy(update={"step": step})
    prefill = [prefilling.model_copy(update={"name": row["name"]}) for row in instances if row["role"] == "prefill"]
    policy = preset(run.preset).for_objectives(slo.ttft_s)
    error = ERROR_MODELS["continuous"]
    simulation = Simulation(work, known, prefill, policy, run.preset, error, first_at_prefill=True)
    simulation.ttft_s, simulation.tpot_s, simulation.gap_s = slo.ttft_s, slo.tpot_s, slo.gap_s
    outcome = simulation.run()
    measured = {"ttft_s": [seen.ttft_s for seen in came], "tpot_s": [seen.tpot_s for seen in came]}
    made = {"ttft_s": metrics.ttft_s(outcome), "tpot_s": metrics.tpot_s(outcome)}
    result: dict[str, Any] = {"preset": run.preset, "preemptions": outcome.preemptions}
    for name, values in measured.items():
        for statistic, q in (("p50", 50), ("p99", 99)):
            real, model = float(np.percentile(values, q)), float(np.percentile(made[name], q))
            result[f"{name}_{statistic}"] = {"measured": real, "simulated": model, "error": model / real - 1.0}
    return result
