"""How far a simulated run is from a recorded one."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ares.policy import preset
from ares.policy.dispatch.base import CALL_CHOOSE
from ares.simulator.cluster import Simulation
from ares.simulator.loop import handle_events
from ares.simulator.profile import Profile, load_profile
from ares.simulator.recording import FloatArray, Recording, chosen, read_recording, request_times
from ares.simulator.state import IMMEDIATE
from ares.terminal import tables

_STATISTICS = ("mean", "p50", "p99")


def replay(recording: Recording, profile: Profile) -> tuple[FloatArray, FloatArray]:
    """Run the arrivals of a recording again; return first token and finish, s.

    On one engine that prefills and decodes; or, for a recording of a gateway (`ares gateway --record`), on the number
    of instances and under the preset that its meta.json names.
    """
    meta = recording.meta
    decode, prefill = int(meta.get("decode_instances", 1)), int(meta.get("prefill_instances", 0))
    simulation = Simulation(
        recording.workload, [profile] * decode, [profile] * prefill, preset(meta.get("preset", "static-rr"))
    )
    state = simulation.build()
    waits = state.parameters.admission_mode != IMMEDIATE or state.parameters.dispatch_rule == CALL_CHOOSE
    if waits or simulation.preset.moves:
        outcome = simulation.run()
        return outcome.first_token_s, outcome.finish_s
    handle_events(state, np.inf)  # no policy is called between events: `calibrate` replays a recording some 2,000 times
    return state.first_token, state.finish


def statistic(values: FloatArray, name: str) -> float:
    """Return a statistic by its name in the result."""
    return float(values.mean()) if name == "mean" else float(np.percentile(values, float(name[1:])))


def validate(directory: Path, profile_name: str, part: str) -> dict[str, Any]:
    """Replay a recording on a profile; errors are relative to what was recorded."""
    recording = read_recording(directory)
    mask = chosen(len(recording.workload), part)
    first, finish = replay(recording, load_profile(profile_name))
    recorded, simulated = recording.times(part), request_times(recording.workload, first, finish, mask)

    def entry(real: float, model: float) -> dict[str, float]:
        return {"recorded": real, "simulated": model, "error": model / real - 1.0}

    result: dict[str, Any] = {"recording": recording.name, "profile": Path(profile_name).stem, "part": part}
    for measure in ("ttft_s", "tpot_s", "e2e_s"):
        result[measure] = {
            name: entry(statistic(recorded[measure], name), statistic(simulated[measure], name)) for name in _STATISTICS
        }
    count = int(mask.sum())
    begin = float(recording.workload.arrival_s[mask][0])
    real_span, model_span = (float(times["finish_s"].max()) - begin for times in (recorded, simulated))
    result["throughput_rps"] = entry(count / real_span, count / model_span)
    result["per_request_e2e_error"] = float(np.mean(np.abs(simulated["e2e_s"] / recorded["e2e_s"] - 1.0)))
    return result


def table(result: dict[str, Any]) -> Table:
    """Make the table that the command prints."""
    shown = tables.table("measure", "statistic", "recorded", "simulated", "error")
    for measure in ("ttft_s", "tpot_s", "e2e_s"):
        for name in _STATISTICS:
            row = result[measure][name]
            shown.add_row(measure, name, f"{row['recorded']:.4g}", f"{row['simulated']:.4g}", f"{row['error']:+.2%}")
    row = result["throughput_rps"]
    shown.add_row("throughput_rps", "", f"{row['recorded']:.4g}", f"{row['simulated']:.4g}", f"{row['error']:+.2%}")
    return shown
