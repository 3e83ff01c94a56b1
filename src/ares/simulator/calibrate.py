"""Fit an engine's step-time model to a recording, and scale it to other hardware.

A recording holds times of requests, not of steps, so the model is found by replaying it: its coefficients are varied
(Nelder-Mead on their logarithms, from several starts) until the replay's TTFT, TPOT and end-to-end times match those
recorded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize

from ares.simulator.profile import Hardware, Profile, ProfileError, StepTimeModel
from ares.simulator.recording import FloatArray, Recording, chosen, read_recording, request_times
from ares.simulator.validate import replay, statistic

_COEFFICIENTS = ("base_s", "per_request_s", "per_resident_token_s", "per_prefill_token_s", "per_prefill_context_s")
_STARTS = (
    (0.016, 5e-5, 1e-7, 1e-4, 1e-9),
    (0.030, 1e-4, 2e-7, 2e-4, 1e-9),
    (0.010, 2e-5, 5e-8, 5e-5, 1e-9),
)


def recorded_engine(recording: Recording, kv_tokens: int | None, name: str) -> dict[str, Any]:
    """Return the fields of a profile that the recording names, and that need no fit."""
    meta = recording.meta
    work = recording.workload
    cache, engine = meta.get("kv_cache") or {}, meta.get("engine_kwargs") or {}
    block = int(cache.get("block_size") or 16)
    if kv_tokens is not None and kv_tokens < block:
        raise ValueError(f"--kv-tokens: {kv_tokens} tokens are less than one block of {block}")
    slots = int(engine.get("max_num_seqs") or 256)
    if kv_tokens is None and cache.get("num_gpu_blocks"):
        kv_tokens = (int(cache["num_gpu_blocks"]) - 1) * block  # vLLM keeps one block as the null block
    if kv_tokens is None:
        # Not recorded: as much as every slot could want, so that slots are what limits the batch.
        kv_tokens = slots * int((work.prompt_tokens + work.output_tokens).max() + block)
    return {
        "name": name,
        "model": str(meta.get("model", "unknown")),
        "source": f"calibrated on {recording.name}, vLLM {meta.get('vllm_version', 'unknown')}",
        "kv_tokens": kv_tokens // block * block,
        "kv_bytes_per_token": 131072,
        "block_size": block,
        "max_num_seqs": slots,
        "max_num_batched_tokens": int(engine.get("max_num_batched_tokens") or 2048),
    }


def mismatch(recording: Recording, simulated: dict[str, FloatArray], part: str) -> float:
    """Weighted mean of relative errors: of mean, P50 and P99 of each time, and request by request."""
    recorded = recording.times(part)
    errors = []
    for measure in ("ttft_s", "tpot_s", "e2e_s"):
        for name, weight in (("mean", 2.0), ("p50", 1.0), ("p99", 1.0)):
            real, model = statistic(recorded[measure], name), statistic(simulated[measure], name)
            errors.append(weight * abs(model / real - 1.0))
        scale = float(recorded[measure].mean())
        errors.append(float(np.abs(simulated[measure] - recorded[measure]).mean()) / scale)
    errors.append(2.0 * abs(float(simulated["finish_s"].max()) / float(recorded["finish_s"].max()) - 1.0))
    return float(np.sum(errors)) / 17.0


def calibrate(
    directory: Path,
    part: str,
    kv_tokens: int | None,
    name: str,
    progress: Callable[[float], None],
    evaluations: int = 400,
) -> tuple[Profile, float]:
    """Fit a profile.

    Parameters
    ----------
    directory
        The recording.
    part
        Which requests count; all are replayed, since each shapes the others' times.
    kv_tokens
        KV capacity; by default that in the recording, and no limit where the recording has none.
    name
        Of the profile.
    progress
        Called with the share of the work that is done, 0 to 1.
    evaluations
        Replays in the search from each starting point; one takes a few milliseconds.

    Returns
    -------
    tuple
        The profile, and the mismatch that remains.
    """
    recording = read_recording(directory)
    mask = chosen(len(recording.workload), part)
    known = recorded_engine(recording, kv_tokens, name)
    done = 0

    def profile_of(logs: FloatArray) -> Profile:
        step = dict(zip(_COEFFICIENTS, np.exp(logs).tolist(), strict=True))
        return Profile.model_validate(known | {"step": step})

    def loss(logs: FloatArray) -> float:
        nonlocal done
        done += 1
        progress(min(done / (evaluations * (len(_STARTS) + 2)), 1.0))
        first, finish = replay(recording, profile_of(logs))
        return mismatch(recording, request_times(recording.workload, first, finish, mask), part)

    def search(start: FloatArray, spread: float) -> Any:
        simplex = np.vstack([start, *(start + spread * row for row in np.eye(len(start)))])
        options = {"maxfev": evaluations, "initial_simplex": simplex, "xatol": 1e-4, "fatol": 1e-5}
        minimize: Any = optimize.minimize
        return minimize(loss, start, method="Nelder-Mead", options=options)

    best = min((search(np.log(np.asarray(start)), 0.5) for start in _STARTS), key=lambda found: float(found.fun))
    for spread in (0.2, 0.05):
        best = min(best, search(best.x, spread), key=lambda found: float(found.fun))
    step = {key: float(f"{value:.5g}") for key, value in zip(_COEFFICIENTS, np.exp(best.x), strict=True)}
    known["source"] += f", {part} of {len(recording.workload)} requests, mismatch {best.fun:.4f}"
    return Profile.model_validate(known | {"step": step}), float(best.fun)


def scaled(
    profile: Profile,
    target: Hardware,
    name: str,
    model: str | None,
    weight_bytes: float | None,
    kv_bytes_per_token: int | None,
    kv_tokens: int | None,
    max_num_seqs: int | None,
) -> Profile:
    """Scale a profile by published memory bandwidth and compute.

    What a step reads (weights and KV) scales with memory bandwidth, what it computes with compute; what remains of the
    base beyond reading the weights at the calibrated efficiency is overhead of the host, and stays.

    Raises
    ------
    ProfileError
        Where the profile does not name its hardware and weights.
    """
    source = profile.hardware
    if source is None or profile.weight_bytes <= 0:
        raise ProfileError(f"profile {profile.name}: hardware and weight_bytes are needed to scale it")
    weights = weight_bytes or profile.weight_bytes
    kv_bytes = kv_bytes_per_token or profile.kv_bytes_per_token
    memory = source.memory_bytes_s / target.memory_bytes_s
    compute = source.flops / target.flops
    reading = profile.weight_bytes / source.memory_bytes_s
    overhead = max(profile.step.base_s - reading, 0.0)
    step = StepTimeModel(
        base_s=overhead + weights / target.memory_bytes_s,
        per_request_s=profile.step.per_request_s,
        per_resident_token_s=profile.step.per_resident_token_s * memory * kv_bytes / profile.kv_bytes_per_token,
        per_prefill_token_s=profile.step.per_prefill_token_s * compute * weights / profile.weight_bytes,
        per_prefill_context_s=profile.step.per_prefill_context_s * compute,
    )
    return profile.model_copy(
        update={
            "name": name,
            "model": model or profile.model,
            "source": f"scaled from {profile.name} ({source.name}) to {target.name} by published figures",
            "step": step,
            "weight_bytes": weights,
            "kv_bytes_per_token": kv_bytes,
            "kv_tokens": kv_tokens or profile.kv_tokens,
            "max_num_seqs": max_num_seqs or profile.max_num_seqs,
            "hardware": target,
        }
    )
