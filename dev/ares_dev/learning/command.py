"""`python -m ares_dev learning`: a cluster without a predictor learns one from its traffic (docs/learning.md)."""

import asyncio
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from ares import extras
from ares.bench import steady
from ares.bench.environment import write
from ares.bench.options import DecodeInstances, Dtype, JsonFile, Model, Port
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares.predictor import prompts as prompt_files
from ares.terminal import tables
from ares.terminal.progress import progress_display
from ares.terminal.signals import signal_as_interrupt
from ares_dev.learning import run as runs
from ares_dev.learning.traffic import Phase

_errors = Console(stderr=True)


def command(
    prompts: Annotated[list[Path], typer.Option(help="File of prompts that users send; may be repeated.")],
    drift_prompts: Annotated[
        list[Path] | None, typer.Option(help="File of other prompts, which come after that; may be repeated.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.5, help="How long the first prompts are sent.")] = 40.0,
    drift_minutes: Annotated[float, typer.Option(min=0.5, help="And how long the others.")] = 20.0,
    rate: Annotated[float, typer.Option(min=0.01, help="Requests per second, Poisson arrivals.")] = 1.0,
    limit: Annotated[int, typer.Option(min=2, help="Most output tokens of a request.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the first prompts.")] = 0.7,
    drift_temperature: Annotated[float, typer.Option(min=0.0, help="Of the others.")] = 1.0,
    slo_tpot_ms: Annotated[float, typer.Option(min=1, help="Time per output token that a request is to keep.")] = 200.0,
    learner: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting of the learner, as first_outputs=150; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and the order of prompts.")] = 0,
    decode: DecodeInstances = 2,
    preset: Annotated[str, typer.Option(help="Policy preset.")] = "ares",
    dtype: Dtype = "auto",
    flags: Annotated[str, typer.Option(metavar="FLAGS", help='Further flags of vLLM: "--max-model-len 1024".')] = "",
    model: Model = DEFAULT_MODEL,
    port: Port = 8010,
    json_file: JsonFile = None,
    report: Annotated[Path | None, typer.Option(help="Folder for the picture.")] = None,
) -> None:
    """Let a cluster learn its predictor from real requests; show the errors over time, and latencies before and after.

    The cluster starts with neither a checkpoint nor recorded states. When the minutes are over, other prompts and
    another temperature show how it follows a change (--drift-prompts).
    """
    if report is not None:
        extras.require("matplotlib")
    signal_as_interrupt()
    phases = [Phase("first", _texts(prompts, seed), 60 * minutes, rate, temperature, limit)]
    if drift_prompts:
        phases.append(Phase("drift", _texts(drift_prompts, seed), 60 * drift_minutes, rate, drift_temperature, limit))
    before = steady.machine_load()
    with tempfile.TemporaryDirectory(prefix="ares-learning-") as folder:
        settings = _settings(model, decode, port, preset, dtype, flags, learner or [], Path(folder))
        learned = _run(settings, phases, seed)
    result = {
        **steady.result_header("learning", model, None, dtype, decode),
        "preset": preset,
        "flags": flags,
        "learner": learner or [],
        "phases": [
            {"name": p.name, "minutes": p.seconds / 60, "rate": p.rate, "temperature": p.temperature, "limit": p.limit}
            for p in phases
        ],
        "slo_tpot_ms": slo_tpot_ms,
        "load_average": {"before": before, "after": steady.machine_load()},
        "swaps": [{"at_s": at, "version": version} for at, version in learned.swapped_at()],
        "learner_cpu_s": learned.learner_cpu_s,
        "learner_cpu_share_of_a_core": round(learned.learner_cpu_s / learned.span_s, 4),
        "parts": {
            name: runs.figures(learned, low, high, slo_tpot_ms / 1000)
            for name, low, high in runs.parts(learned, phases)
        },
        "losses": learned.losses,
        "events": learned.events,
        "samples": learned.samples,
    }
    _show(result)
    if report is not None:
        from ares_dev.learning import plots

        report.mkdir(parents=True, exist_ok=True)
        plots.draw(learned, phases, report / "learning.svg")
    write(result, json_file)


def _texts(files: list[Path], seed: int) -> list[str]:
    return [prompt.text for prompt in prompt_files.read(files, seed, _errors.print)]


def _settings(
    model: str, decode: int, port: int, preset: str, dtype: str, flags: str, learner: list[str], folder: Path
) -> local.ClusterSettings:
    settings = steady.cluster_settings(model, decode, port, None, dtype, preset)
    return replace(
        settings,
        vllm_flags=(*settings.vllm_flags, *shlex.split(flags)),
        worker_flags=("--predictor", "learn"),
        learn_folder=folder,
        learner_flags=tuple(word for each in learner for word in ("--set", each)),
    )


def _run(settings: local.ClusterSettings, phases: list[Phase], seed: int) -> runs.Learned:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with local.running(settings, _errors) as cluster, progress_display(_errors, *columns) as bar:
        task = bar.add_task("learning", total=sum(phase.seconds for phase in phases))

        def show(at_s: float, learned: runs.Learned) -> None:
            newest = learned.events[-1]["event"] if learned.events else "nothing learned yet"
            bar.update(task, completed=at_s, description=f"{len(learned.requests)} requests, {newest}")

        return asyncio.run(runs.run(cluster, phases, seed, show))


def _show(result: dict[str, Any]) -> None:
    table = tables.table(
        "part", "requests", "failed", "TPOT p50 ms", "p99", "longest gap p99 ms", "preemptions a minute"
    )
    for name, row in result["parts"].items():
        table.add_row(
            name,
            str(row["requests"]),
            str(row["failed"]),
            f"{row['tpot_ms'].get('p50', 0):.1f}",
            f"{row['tpot_ms'].get('p99', 0):.1f}",
            f"{row['longest_gap_ms'].get('p99', 0):.0f}",
            f"{row['preemptions_per_minute']:.2f}",
        )
    tables.show(table)
    for event in result["events"]:
        typer.echo(f"{event['at_s'] / 60:6.1f} min  {event['text']}")
    typer.echo(
        f"learner: {result['learner_cpu_s']:.0f} s of CPU, {result['learner_cpu_share_of_a_core']:.1%} of a core"
    )
