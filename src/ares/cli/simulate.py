"""`ares simulate`: replay a trace over a simulated cluster; sweep, calibrate, validate, scale."""

import json
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ares import extras
from ares.cli.options import Policies, Settings
from ares.cli.simulate_options import (
    Admission,
    Classes,
    Decode,
    Dispatch,
    Format,
    Out,
    Period,
    Predictor,
    Prefill,
    PrefillProfile,
    PrefixCaching,
    Presets,
    ProfileName,
    Rebalance,
    Requests,
    Seed,
    SloTpot,
    SloTtft,
    TimeUnit,
    Trace,
)
from ares.objectives import DEFAULT_GAP_S, SloGap, json_gap
from ares.terminal import tables
from ares.terminal.output_files import check_folder, check_writable
from ares.terminal.progress import progress_display
from ares.traces import WORKLOADS, rate_warning

if TYPE_CHECKING:
    from ares.simulator.classes import SimulatedClass
    from ares.simulator.scenario import Scenario

app = typer.Typer(
    help="Replay a trace over a simulated prefill-decode cluster, with the policy code of the live service.",
    invoke_without_command=True,
    rich_markup_mode="markdown",
)

DEFAULT_PRESETS = ["static-rr", "static-least-loaded", "ares"]


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors that a user can correct into one line on standard error and exit status 2."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        option = "-".join(str(part) for part in first["loc"]).replace("_", "-")
        typer.echo(f"ares simulate: --{option}: {first['msg']}", err=True)
        raise typer.Exit(2) from None
    except (ModuleNotFoundError, extras.MissingPackageError, ValueError, OSError) as error:
        message = extras.explain(error) if isinstance(error, ModuleNotFoundError) else error
        typer.echo(f"ares simulate: {message}", err=True)
        raise typer.Exit(2) from None


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write a result to a file, or to standard output for '-'."""
    text = json.dumps(result, indent=2) + "\n"
    if str(path) == "-":
        typer.echo(text, nl=False)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def progress_bar() -> Progress:
    """Make the progress bar of a long command, on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    return progress_display(Console(stderr=True), *columns, transient=True)


def show(runs: list[dict[str, Any]]) -> None:
    """Print the runs as a table."""
    times = ("TTFT\np50 s", "TTFT\np99 s", "TPOT\np50 ms", "TPOT\np99 ms", "gap\np99 s")
    table = tables.table("preset", "load", *times, "goodput\n/s", "SLOs\nmet", "preempt", "moves")
    for run in runs:
        counts = (str(run["preemptions"]), str(run["migrations"]))
        table.add_row(run["preset"], f"{run['load']:.3g}", *_cells(run), *counts)
        for name, part in run.get("classes", {}).items():
            table.add_row(f"  {name}", "", *_cells(part))
    tables.show(table)


def _cells(run: dict[str, Any]) -> list[str]:
    """Return the figures of a run, or of the requests of one class."""
    return [
        *(f"{run['ttft_s'][name]:.{digits}g}" for name, digits in (("p50", 3), ("p99", 4))),
        *(f"{run['tpot_s'][name] * 1e3:.1f}" for name in ("p50", "p99")),
        f"{run['longest_gap_s']['p99']:.3g}",
        f"{run['goodput_rps']:.4g}",
        f"{run['slo_share']:.1%}",
    ]


@app.callback()
def simulate(
    context: typer.Context,
    trace: Trace = "paper",
    trace_format: Format = None,
    time_unit: TimeUnit = None,
    requests: Requests = None,
    prefill: Prefill = 2,
    decode: Decode = 4,
    profile: ProfileName = "r1-qwen-7b-24gb",
    prefill_profile: PrefillProfile = None,
    presets: Presets = None,
    load: Annotated[float | None, typer.Option(min=0.001, help="Arrivals, as a multiple of capacity.")] = None,
    rate_scale: Annotated[float | None, typer.Option(min=0.001, help="Arrivals, as a multiple of the trace's.")] = None,
    slo_ttft: SloTtft = 20.0,
    slo_tpot: SloTpot = 0.03,
    slo_gap: SloGap = DEFAULT_GAP_S,
    classes: Classes = None,
    predictor: Predictor = "continuous",
    period: Period = 0.5,
    seed: Seed = 0,
    dispatch: Dispatch = None,
    admission: Admission = None,
    rebalance: Rebalance = None,
    policies: Policies = None,
    settings: Settings = None,
    prefix_caching: PrefixCaching = False,
    json_path: Out = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page into this folder.")] = None,
    curves: Annotated[Path | None, typer.Option(help="A sweep's JSON, for the load curves of the report.")] = None,
) -> None:
    """Replay a trace over a simulated prefill-decode cluster.

    Without a sub-command, runs each preset once:

    `ares simulate --trace paper --decode 8 --load 1.0 --preset static-rr --preset ares --json -`
    """
    with user_errors():
        from ares.cli import given_options as options

        given = options.given_flags(context)
        if context.invoked_subcommand is not None:
            options.refuse_before_command(given, context.invoked_subcommand)
            return
        extras.require("numba", *(["matplotlib"] if report is not None else []))
        from ares.simulator import metrics
        from ares.simulator import scenario as scenarios

        if load is not None and rate_scale is not None:
            raise ValueError("--load and --rate-scale: give one of the two")
        options.refuse_not_finite(load=load, rate_scale=rate_scale, slo_ttft=slo_ttft, slo_tpot=slo_tpot, period=period)
        if load is None and rate_scale is None:
            load, rate_scale = (1.0, None) if trace in WORKLOADS else (None, 1.0)
        scenario = scenarios.Scenario(
            trace, trace_format, requests, prefill, decode, profile, prefill_profile, predictor, period,
            admission=admission, dispatch=dispatch, rebalance=rebalance,
            slo_ttft=slo_ttft, slo_tpot=slo_tpot, slo_gap=slo_gap, classes=_classes(classes), time_unit=time_unit,
            policies=tuple(policies or ()), settings=tuple(settings or ()), prefix_caching=prefix_caching,
        )  # fmt: skip
        names = presets or DEFAULT_PRESETS
        check(given, scenario, names)
        swept = _prepare_outputs(json_path, report, curves)
        scenario = read(scenario, warn_of_rate=rate_scale is not None)
        outcomes, runs = [], []
        prepared = [scenario.simulation(name, load, rate_scale, seed) for name in names]
        with progress_bar() as bar:
            for name, (simulation, actual) in zip(names, prepared, strict=True):
                task = bar.add_task(name, total=1.0)
                outcome = simulation.run(lambda done, task=task: bar.update(task, completed=done))  # type: ignore[misc]
                outcomes.append(outcome)
                runs.append(metrics.summary(outcome, actual, slo_ttft, slo_tpot))
        result = {
            "runs": runs,
            "slo": {"ttft_s": slo_ttft, "tpot_s": slo_tpot, "gap_s": json_gap(slo_gap)},
            "scenario": scenarios.described(scenario, seed),
            "provenance": metrics.provenance(),
        }
        if report is not None:
            from ares.simulator.report import write_report

            command = shlex.join(["ares", *sys.argv[1:]])
            typer.echo(f"wrote {write_report(report, result, outcomes, swept, command)}", err=True)
        if json_path is not None:
            write_json(result, json_path)
        if str(json_path) != "-":
            show(runs)


def check(given: set[str], scenario: "Scenario", names: list[str]) -> None:
    """Refuse presets and options that do not go together, before anything is read or run."""
    from ares.cli import given_options as options

    options.refuse_repeated("--preset", names)
    options.refuse_without_effect(given, scenario, [scenario.policy(name) for name in names])
    scenario.profiles()


def read(scenario: "Scenario", *, warn_of_rate: bool) -> "Scenario":
    """Read the trace file, if there is one, and print notes about it."""
    scenario = scenario.read()
    work = scenario.recorded
    if work is not None:
        for note in (*work.notes, *filter(None, [rate_warning(work) if warn_of_rate else None])):
            typer.echo(f"ares simulate: {note}", err=True)
    return scenario


def _classes(path: Path | None) -> "tuple[tuple[str, SimulatedClass], ...]":
    """Read the classes of service, if there are any."""
    if path is None:
        return ()
    from ares.simulator.classes import read_classes

    return tuple(read_classes(path).items())


def _prepare_outputs(json_path: Path | None, report: Path | None, curves: Path | None) -> dict[str, Any] | None:
    """Raise OSError for outputs that cannot be written, before the runs; return the sweep for the report's curves."""
    if json_path is not None and str(json_path) != "-":
        check_writable(json_path)
    if report is not None:
        check_folder(report)
    if curves is None:
        return None
    from ares.simulator.report import read_sweep

    return read_sweep(curves)


@app.command()
def sweep(
    context: typer.Context,
    trace: Trace = "paper",
    trace_format: Format = None,
    requests: Requests = None,
    prefill: Prefill = 2,
    decode: Decode = 4,
    profile: ProfileName = "r1-qwen-7b-24gb",
    prefill_profile: PrefillProfile = None,
    presets: Presets = None,
    loads: Annotated[
        str, typer.Option(help="Multiples of capacity, separated by commas.")
    ] = "0.5,0.7,0.9,1.0,1.1,1.3,1.5",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each preset at each load.")] = 3,
    slo_ttft: SloTtft = 20.0,
    slo_tpot: SloTpot = 0.03,
    slo_gap: SloGap = DEFAULT_GAP_S,
    classes: Classes = None,
    predictor: Predictor = "continuous",
    period: Period = 0.5,
    policies: Policies = None,
    settings: Settings = None,
    prefix_caching: PrefixCaching = False,
    processes: Annotated[int, typer.Option(min=1, help="Concurrent runs.")] = 1,
    json_path: Out = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this file (svg, png or pdf).")] = None,
) -> None:
    """Run loads x presets x seeds and report means with 95 % confidence intervals."""
    with user_errors():
        extras.require("numba", "scipy", *(["matplotlib"] if plot is not None else []))
        from ares.cli import given_options as options
        from ares.simulator import metrics
        from ares.simulator import scenario as scenarios
        from ares.simulator import sweep as sweeps

        points = _loads(loads)
        options.refuse_not_finite(slo_ttft=slo_ttft, slo_tpot=slo_tpot, period=period)
        scenario = scenarios.Scenario(
            trace, trace_format, requests, prefill, decode, profile, prefill_profile, predictor, period,
            slo_ttft=slo_ttft, slo_tpot=slo_tpot, slo_gap=slo_gap, classes=_classes(classes),
            policies=tuple(policies or ()), settings=tuple(settings or ()), prefix_caching=prefix_caching,
        )  # fmt: skip
        names = presets or DEFAULT_PRESETS
        check(options.given_flags(context), scenario, names)
        _prepare_outputs(json_path, None, None)
        if plot is not None:
            from ares.simulator.plots import check_plot

            check_plot(plot)
        scenario = read(scenario, warn_of_rate=False)  # the loads set the rate
        for name in names:
            scenario.simulation(name, points[0], None, 0)[0].build()  # bad input ends here, before any process starts
        with progress_bar() as bar:
            task = bar.add_task("sweep", total=len(points) * len(names) * seeds)
            runs = sweeps.sweep(
                scenario, names, points, seeds, slo_ttft, slo_tpot, processes, lambda: bar.advance(task)
            )
        result: dict[str, Any] = {
            "points": sweeps.points(runs),
            "runs": runs,
            "slo": {"ttft_s": slo_ttft, "tpot_s": slo_tpot, "gap_s": json_gap(slo_gap)},
            "scenario": scenarios.described(scenario, None) | {"seeds": seeds},
            "provenance": metrics.provenance(),
        }
        if plot is not None:
            from ares.simulator.plots import load_curves

            load_curves(result["points"], result["slo"], plot)
        if json_path is not None:
            write_json(result, json_path)
        if str(json_path) != "-":
            show([point | {"preemptions": round(point["preemptions"]), "migrations": round(point["migrations"])}
                  for point in result["points"]])  # fmt: skip


def _loads(text: str) -> list[float]:
    """Return the loads of several runs; ValueError where they are not positive numbers, each once."""
    from ares.cli import given_options as options

    try:
        points = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--loads: not numbers with commas: {text!r}") from None
    if not all(0 < point < math.inf for point in points):
        raise ValueError(f"--loads: must be positive and finite: {text!r}")
    options.refuse_repeated("--loads", points)
    return points


@app.command()
def calibrate(
    context: typer.Context,
    recording: Annotated[Path, typer.Option(help="Folder with requests.jsonl and meta.json of a real vLLM run.")],
    out: Annotated[Path, typer.Option(help="Write the profile here.")],
    part: Annotated[str, typer.Option(help="Requests to fit: all, first or second half, even or odd.")] = "all",
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="KV capacity; by default what the recording says.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the profile; the file's by default.")] = None,
    kv_bytes_per_token: Annotated[int, typer.Option(min=1, help="KV bytes of one token of the model.")] = 131072,
    weight_bytes: Annotated[float, typer.Option(min=0, help="Bytes of the model's weights, for scaling.")] = 0.0,
    hardware: Annotated[str | None, typer.Option(help="Name of the accelerator, for scaling.")] = None,
    memory_bytes_s: Annotated[float, typer.Option(help="Its published bandwidth, summed over an instance.")] = 0.0,
    flops: Annotated[float, typer.Option(help="Its published dense compute, summed over an instance.")] = 0.0,
) -> None:
    """Fit an engine's step time and transfer models to a recording of a real vLLM run."""
    from ares.simulator.profile import Hardware

    with user_errors(), progress_bar() as bar:
        from ares.cli import given_options as options
        from ares.simulator import calibrate as calibration

        options.refuse_not_finite(memory_bytes_s=memory_bytes_s, flops=flops, weight_bytes=weight_bytes)
        if hardware is not None and min(memory_bytes_s, flops) <= 0:
            raise ValueError("--hardware: needs --memory-bytes-s and --flops too")
        if hardware is None and (idle := options.given_flags(context) & {"--memory-bytes-s", "--flops"}):
            raise ValueError(f"{', '.join(sorted(idle))}: needs --hardware too, the accelerator that it is of")
        check_writable(out)
        task = bar.add_task("fitting", total=1.0)
        profile, error = calibration.calibrate(
            recording, part, kv_tokens, name or out.stem, lambda done: bar.update(task, completed=done)
        )
        described = Hardware(name=hardware, memory_bytes_s=memory_bytes_s, flops=flops) if hardware else None
        profile = profile.model_copy(
            update={"kv_bytes_per_token": kv_bytes_per_token, "weight_bytes": weight_bytes, "hardware": described}
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(profile.model_dump_json(indent=2) + "\n", encoding="utf-8")
        typer.echo(f"wrote {out}; residual {error:.4f} (weighted mean of relative errors)", err=True)


@app.command()
def validate(
    recording: Annotated[Path, typer.Option(help="Folder with requests.jsonl and meta.json of a real vLLM run.")],
    profile: Annotated[str, typer.Option(help="The profile to validate: a name or a JSON file.")],
    part: Annotated[str, typer.Option(help="Requests to compare: all, first or second half, even or odd.")] = "all",
    json_path: Out = None,
) -> None:
    """Replay a recording's arrivals and compare TTFT, TPOT, end-to-end time and throughput."""
    with user_errors():
        from ares.simulator import metrics
        from ares.simulator import validate as validation

        result = validation.validate(recording, profile, part)
        if json_path is not None:
            write_json(result | {"provenance": metrics.provenance()}, json_path)
        if str(json_path) != "-":
            tables.show(validation.table(result))


@app.command()
def prefixes(
    trace: Annotated[Path, typer.Option(help="A trace that names the blocks of its prompts: Mooncake, Bailian.")],
    profile: ProfileName = "r1-qwen-7b-80gb",
    instances: Annotated[int, typer.Option(min=1, help="Prefill instances.")] = 4,
    policies: Annotated[str, typer.Option(help="Prefill policies, separated by commas.")] = (
        "round_robin,fewest_requests,longest_prefix,least_time"
    ),
    loads: Annotated[str, typer.Option(help="Loads, separated by commas; 1: busy if nothing is cached.")] = (
        "0.5,0.75,1,1.25,1.5"
    ),
    requests: Annotated[int | None, typer.Option(min=2, help="Only so many, from the first on.")] = None,
    json_path: Out = None,
) -> None:
    """Compare prefill policies on instances with prefix caches: hit rates, and times to the first token."""
    with user_errors():
        from ares.cli import given_options as options
        from ares.simulator import metrics, prefix_caches
        from ares.simulator.profile import load_profile
        from ares.traces.prompt_blocks import read_prompts

        wanted, names = _loads(loads), policies.split(",")
        options.refuse_repeated("--policies", names)
        engine = load_profile(profile)
        prompts, block_tokens = read_prompts(trace, requests)
        result = prefix_caches.compare(prompts, block_tokens, engine, instances, names, wanted)
        result |= {"trace": trace.name, "profile": engine.name, "instances": instances}
        if json_path is not None:
            write_json(result | {"provenance": metrics.provenance()}, json_path)
        if str(json_path) != "-":
            columns = ("load", "hit rate\n%", "TTFT\np50 s", "TTFT\np99 s")
            title = f"{len(prompts)} prompts; one endless cache: {100 * result['ideal_hit_rate']:.1f} %"
            table = tables.table("prefill", *columns, title=title)
            for run in result["runs"]:
                times = (f"{run['ttft_s']['p50']:.3f}", f"{run['ttft_s']['p99']:.3f}")
                table.add_row(run["prefill"], f"{run['load']:g}", f"{100 * run['hit_rate']:.1f}", *times)
            tables.show(table)


@app.command()
def roles(
    first: Annotated[Path, typer.Option(help="A trace: the traffic in the morning and in the evening.")],
    second: Annotated[Path, typer.Option(help="A trace: the traffic at noon.")],
    profile: ProfileName = "r1-qwen-7b-80gb",
    instances: Annotated[int, typer.Option(min=3, max=64, help="Instances, each of which prefills or decodes.")] = 8,
    preset: Annotated[str, typer.Option(help="Policy preset.")] = "static-least-loaded",
    predictor: Annotated[str, typer.Option(help="Error of the predictor, by name or file.")] = "continuous",
    load: Annotated[
        float, typer.Option(min=0.01, max=10, help="Load if the ratio of the roles were the best one at all times.")
    ] = 0.7,
    day: Annotated[float, typer.Option(min=60, max=86400, help="Seconds that the day is scaled to.")] = 2400.0,
    slo_ttft: SloTtft = 10.0,
    slo_tpot: SloTpot = 0.05,
    seed: Seed = 1,
    json_path: Out = None,
) -> None:
    """Compare instances that change roles with every fixed ratio, over a day of changing traffic."""
    with user_errors():
        from ares.cli import given_options as options
        from ares.policy import preset as known_preset
        from ares.policy.roles import PressureSettings
        from ares.simulator import metrics, role_day
        from ares.simulator.error_model_files import error_model
        from ares.simulator.profile import load_profile
        from ares.traces import read_trace

        options.refuse_not_finite(load=load, day=day, slo_ttft=slo_ttft, slo_tpot=slo_tpot)
        options.refuse_zero(slo_ttft=slo_ttft, slo_tpot=slo_tpot)
        policy = known_preset(preset)
        if policy.sees_prefixes:
            raise ValueError(
                f"--preset {preset} looks at what is cached, and changes of role are simulated without prefix caches"
            )
        engine, settings = load_profile(profile), PressureSettings()
        works = read_trace(first), read_trace(second)
        rates = [load * role_day.best_rate(work, engine, instances) for work in works]
        work = role_day.changing_mix(*works, (rates[0], rates[1]), day, seed)
        with progress_bar() as bar:
            task = bar.add_task("ratios", total=1.0)
            runs = role_day.compare(
                work, engine, instances, (preset, policy), error_model(predictor), (slo_ttft, slo_tpot),
                settings, lambda share: bar.update(task, completed=share),
            )  # fmt: skip
        result: dict[str, Any] = {
            "first": first.name, "second": second.name, "profile": engine.name, "instances": instances,
            "preset": preset, "predictor": predictor, "load": load, "day_s": day, "requests": len(work),
            "rates_rps": rates, "slo_ttft_s": slo_ttft, "slo_tpot_s": slo_tpot, "seed": seed,
            "planner": asdict(settings), "runs": runs,
        }  # fmt: skip
        if json_path is not None:
            write_json(result | {"provenance": metrics.provenance()}, json_path)
        if str(json_path) != "-":
            _show_roles(result)


def _show_roles(result: dict[str, Any]) -> None:
    columns = ("SLOs\nmet", "TTFT\np50 s", "TTFT\np99 s", "TPOT\np99 ms", "preempt", "moves", "changes")
    title = f"{result['requests']} requests on {result['instances']} instances"
    table = tables.table("prefill + decode", *columns, title=title)
    for run in result["runs"]:
        name = "planned" if run["planned"] else f"{result['instances'] - run['decode']} + {run['decode']}"
        times = (f"{run['ttft_s']['p50']:.3g}", f"{run['ttft_s']['p99']:.4g}", f"{run['tpot_s']['p99'] * 1e3:.1f}")
        counts = (run["preemptions"], run["migrations"], len(run["changes"]))
        table.add_row(name, f"{run['slo_share']:.1%}", *times, *map(str, counts))
    tables.show(table)


@app.command()
def scale(
    profile: Annotated[str, typer.Option(help="A calibrated profile that names its hardware.")],
    out: Annotated[Path, typer.Option(help="Write the scaled profile here.")],
    hardware: Annotated[str, typer.Option(help="Name of the other accelerator.")],
    memory_bytes_s: Annotated[float, typer.Option(help="Its published memory bandwidth, summed over an instance.")],
    flops: Annotated[float, typer.Option(help="Its published dense compute, summed over an instance.")],
    model: Annotated[str | None, typer.Option(help="Another model.")] = None,
    weight_bytes: Annotated[float | None, typer.Option(min=1, help="Bytes of its weights.")] = None,
    kv_bytes_per_token: Annotated[int | None, typer.Option(min=1, help="KV bytes of one of its tokens.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="KV capacity of an instance.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="vLLM's limit on running requests.")] = None,
) -> None:
    """Scale a calibrated profile to other hardware, or another model, from published figures."""
    with user_errors():
        from ares.cli import given_options as options
        from ares.simulator import calibrate as calibration
        from ares.simulator.profile import Hardware, load_profile

        options.refuse_not_finite(memory_bytes_s=memory_bytes_s, flops=flops, weight_bytes=weight_bytes)
        if model is not None and None in (weight_bytes, kv_bytes_per_token, kv_tokens):
            raise ValueError("--model: another model needs --weight-bytes, --kv-bytes-per-token and --kv-tokens too")
        check_writable(out)
        target = Hardware(name=hardware, memory_bytes_s=memory_bytes_s, flops=flops)
        scaled = calibration.scaled(
            load_profile(profile), target, out.stem, model, weight_bytes, kv_bytes_per_token, kv_tokens, max_num_seqs
        )
        out.write_text(scaled.model_dump_json(indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
