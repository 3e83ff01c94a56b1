"""`ares bench rollouts`: a batch of prompts that all come at once, as in reinforcement learning: the time to its end.

On simulated engines. A training step waits for the last output of its batch; with long-tailed lengths, some instances
have nothing left to do long before. Each preset runs the same batches, drawn by the same seeds.
"""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console

from ares import extras
from ares.bench.environment import describe, write
from ares.bench.options import JsonFile
from ares.terminal.errors import exit_with_error
from ares.terminal.progress import progress_display
from ares.terminal.tables import show, table
from ares.traces import Workload
from ares.traces.records import TraceError

if TYPE_CHECKING:
    from ares.simulator.cluster import Outcome

# Without moves and with them, and what most routers do.
PRESETS = ("static-rr", "static-least-loaded", "ares-suspension", "ares")
_MEASURED = ("last_s", "p50_s", "p90_s", "p99_s", "tokens_per_s", "idle_share")


def batch(work: Workload, samples: int) -> Workload:
    """Return the same outputs in a batch: they all arrive at once, and each prompt is that of `samples` of them."""
    of_prompt = np.arange(len(work)) // samples * samples
    templates = None if work.templates is None else work.templates[of_prompt]
    prompts = work.prompt_tokens[of_prompt]
    return replace(work, arrival_s=np.zeros(len(work)), prompt_tokens=prompts, templates=templates)


def measured(outcome: "Outcome") -> dict[str, Any]:
    """Return the figures of one run: when outputs ended, and how much of the decode instances' time was idle.

    Raises
    ------
    ValueError
        An output did not end.
    """
    ends = outcome.finish_s
    if not np.isfinite(ends).all():
        raise ValueError(f"{int((~np.isfinite(ends)).sum())} outputs did not end")
    last = float(ends.max())
    p50, p90, p99 = np.percentile(ends, [50, 90, 99]).tolist()
    during = outcome.sample_s <= last
    return {
        "last_s": last,
        "p50_s": p50,
        "p90_s": p90,
        "p99_s": p99,
        "tokens_per_s": float(outcome.workload.output_tokens.sum()) / last,
        "idle_share": float((outcome.kv_use[during] == 0).mean()) if during.any() else 0.0,
        "moves": outcome.migrations,
        "suspensions": outcome.suspensions,
        "preemptions": outcome.preemptions,
    }


def summary(runs: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the batches, and of the time to the last output its ratio to that of another preset."""
    medians = {name: statistics.median(run[name] for run in runs) for name in (*_MEASURED, "moves", "suspensions")}
    ratios = [run["last_s"] / other["last_s"] for run, other in zip(runs, baseline, strict=True)]
    return {**medians, "last_by_baseline": statistics.median(ratios), "ratios": ratios}


def command(
    trace: Annotated[
        str, typer.Option(help="A built-in workload or a trace file, of which the lengths are used.")
    ] = "paper",
    requests: Annotated[int, typer.Option(help="Outputs of a batch.", min=1)] = 512,
    samples: Annotated[int, typer.Option(help="Outputs for each prompt.", min=1)] = 8,
    decode: Annotated[int, typer.Option(help="Decode instances.", min=1)] = 8,
    prefill: Annotated[int, typer.Option(help="Prefill instances.", min=0)] = 2,
    profile: Annotated[str, typer.Option(help="Engine.")] = "r1-qwen-7b-80gb",
    predictor: Annotated[
        str, typer.Option(help="Error model of the predictor, as in `ares simulate`.")
    ] = "residual-life",
    batches: Annotated[int, typer.Option(help="Batches, each with another seed.", min=1)] = 5,
    presets: Annotated[
        list[str] | None,
        typer.Option("--preset", help="May be repeated; the first one is what others are compared to."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Time a batch of rollouts to its last output, with and without moves, on simulated engines."""
    extras.require("numba")
    from ares.simulator.error_models import ERROR_MODELS
    from ares.simulator.profile import ProfileError
    from ares.simulator.scenario import Scenario

    names = list(dict.fromkeys(presets or PRESETS))
    scenario = Scenario(trace, None, requests, prefill, decode, profile, None, predictor, 0.5)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        scenario = scenario.read()
        with progress_display(Console(stderr=True), transient=True) as progress:
            for name, seed in progress.track([(n, s) for n in names for s in range(batches)], description="simulating"):
                simulation, _ = scenario.simulation(name, None, None, seed)
                simulation.workload = batch(simulation.workload, samples)
                runs[name].append(measured(simulation.run()))
    except (ProfileError, TraceError, ValueError) as error:
        exit_with_error(str(error))
    result = {
        "presets": {name: summary(runs[name], runs[names[0]]) for name in names},
        "runs": runs,
        "baseline": names[0],
        "trace": Path(trace).name,
        "requests": requests,
        "samples": samples,
        "decode": decode,
        "prefill": prefill,
        "profile": Path(profile).stem,
        "predictor": predictor if predictor in ERROR_MODELS else Path(predictor).name,
        **describe(),
    }
    _print(result)
    write(result, json_file)


def _print(result: dict[str, Any]) -> None:
    title = f"time to the last of {result['requests']:,} outputs, medians"
    made = table("preset", "last s", "of first", "p50 s", "p99 s", "tokens/s", "idle", "moves", title=title)
    for name, one in result["presets"].items():
        p50, p99, pace = (f"{one[value]:,.0f}" for value in ("p50_s", "p99_s", "tokens_per_s"))
        ratio, idle, moves = f"{one['last_by_baseline']:.3f}", f"{one['idle_share']:.0%}", f"{one['moves']:,.0f}"
        made.add_row(name, f"{one['last_s']:,.0f}", ratio, p50, p99, pace, idle, moves)
    show(made)
