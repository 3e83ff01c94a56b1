"""A day of changing mix: roles that change against every fixed ratio of prefill to decode instances."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ares.policy import Preset
from ares.policy.roles import PressureSettings, role_policy
from ares.simulator.cluster import Outcome, Simulation
from ares.simulator.error_models import ErrorModel
from ares.simulator.metrics import capacity_rps, summary
from ares.simulator.profile import Profile
from ares.traces import Workload

# Parts of the day with one rate of arrivals each.
_PARTS = 200


def best_rate(work: Workload, profile: Profile, instances: int) -> float:
    """Return the requests per second that fill so many instances under the best ratio for this traffic."""
    ratios = range(1, instances)
    return max(capacity_rps(work, [profile] * decode, [profile] * (instances - decode)) for decode in ratios)


def changing_mix(first: Workload, second: Workload, rates: tuple[float, float], day_s: float, seed: int) -> Workload:
    """Return a day that begins and ends with the first traffic alone, and has the second one alone at its half.

    Parameters
    ----------
    first, second
        Whose requests are taken in their order, and again from the first one.
    rates
        Requests per second of each when it is alone.
    day_s, seed
        Length of the day; draws the arrivals.
    """
    draw = np.random.default_rng(seed)
    moments = (np.arange(_PARTS) + 0.5) / _PARTS
    alone = 0.5 + 0.5 * np.cos(2.0 * math.pi * moments)
    parts: list[tuple[NDArray[np.float64], Workload]] = []
    for work, rate, share in ((first, rates[0], alone), (second, rates[1], 1.0 - alone)):
        counts = draw.poisson(rate * share * day_s / _PARTS)
        arrivals = np.repeat(np.arange(_PARTS), counts) + draw.random(int(counts.sum()))
        parts.append((np.sort(arrivals) * (day_s / _PARTS), work))
    arrival = np.concatenate([moments for moments, _ in parts])
    order = np.argsort(arrival, kind="stable")

    def lengths(name: str) -> NDArray[np.int64]:
        taken = [np.resize(getattr(work, name), len(moments)) for moments, work in parts]
        whole: NDArray[np.int64] = np.concatenate(taken)[order]
        return whole

    return Workload(
        f"{first.name} and {second.name}",
        arrival[order] - arrival[order][0],
        lengths("prompt_tokens"),
        lengths("output_tokens"),
    )


def compare(
    work: Workload,
    profile: Profile,
    instances: int,
    preset: tuple[str, Preset],
    error: ErrorModel,
    objectives_s: tuple[float, float],
    settings: PressureSettings,
    progress: Callable[[float], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Return a summary for each fixed number of decode instances, and last one for the planner.

    The planner begins with as many decode as prefill instances.
    """
    name, policy = preset

    def run(decode: int, prefill: int, **roles: Any) -> Outcome:
        simulation = Simulation(
            work, [profile] * decode, [profile] * prefill, policy, name, error, ttft_s=objectives_s[0],
            tpot_s=objectives_s[1], **roles,
        )  # fmt: skip
        return simulation.run()

    found = []
    for decode in range(1, instances):
        outcome = run(decode, instances - decode)
        found.append(summary(outcome, 1.0, *objectives_s) | {"decode": decode, "planned": False, "changes": []})
        progress(decode / instances)
    outcome = run(instances, instances, roles=role_policy("pressure", settings), decoding=instances // 2)
    changes = [
        {"time_s": one.time_s, "instance": one.instance, "to": one.to, "decode": one.decode, "reason": one.reason}
        for one in outcome.role_changes
    ]
    found.append(summary(outcome, 1.0, *objectives_s) | {"decode": None, "planned": True, "changes": changes})
    progress(1.0)
    return found
