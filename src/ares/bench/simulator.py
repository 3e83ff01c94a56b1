"""How much time and memory `ares simulate` takes, measured in a separate process for each preset."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ares.bench.environment import describe
from ares.policy import PRESETS
from ares.terminal.progress import progress_display

_COMMAND = "import sys; from ares.cli.main import main; sys.argv[0] = 'ares'; main()"


def run(arguments: list[str], cache: Path | None = None) -> dict[str, Any]:
    """Run `ares simulate` and measure all of it: start, compilation or loading, simulation and metrics.

    Parameters
    ----------
    arguments
        Arguments of the command.
    cache
        An empty directory for compiled code; None: the user's.

    Returns
    -------
    dict
        wall_s, cpu_s and peak_memory_bytes of the process; loop_s, the wall time of the simulation alone; requests,
        completed, simulated_s and migrations.
    """
    environment = dict(os.environ)
    if cache is not None:
        environment |= {"XDG_CACHE_HOME": str(cache), "NUMBA_CACHE_DIR": str(cache)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-c", _COMMAND, "simulate", *arguments, "--json", str(out)]
        null = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
        begin = time.perf_counter()
        process = os.posix_spawn(sys.executable, command, environment, file_actions=null)
        _, status, usage = os.wait4(process, 0)
        wall = time.perf_counter() - begin
        if status != 0:
            raise typer.Exit(2)  # the command has printed the reason
        result = json.loads(out.read_text(encoding="utf-8"))["runs"][0]
    return {
        "preset": result["preset"],
        "load": result["load"],
        "requests": result["requests"],
        "completed": result["completed"],
        "wall_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        "loop_s": result["wall_s"],
        "simulated_s": result["simulated_s"],
        "migrations": result["migrations"],
    }


def command(
    trace: Annotated[str, typer.Option(help="A trace file or a built-in workload.")] = "paper",
    requests: Annotated[int, typer.Option(help="How many requests.", min=1)] = 1_000_000,
    decode: Annotated[int, typer.Option(help="Decode instances.", min=1)] = 256,
    prefill: Annotated[int, typer.Option(help="Prefill instances.", min=0)] = 64,
    profile: Annotated[str, typer.Option(help="Engine.")] = "r1-qwen-7b-80gb",
    load: Annotated[float, typer.Option(help="Arrivals, as a multiple of capacity.", min=0.001)] = 0.9,
    period: Annotated[float, typer.Option(help="Seconds between two decisions.", min=0.001)] = 0.5,
    presets: Annotated[list[str] | None, typer.Option("--preset", help="May be repeated.")] = None,
    first_run: Annotated[bool, typer.Option(help="Also run once with nothing compiled yet.")] = True,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the result here ('-': standard output).")
    ] = None,
) -> None:
    """Time `ares simulate` and its memory, once for each preset."""
    names = presets or ["static-rr", "static-least-loaded", "ares"]
    cluster = ["--decode", str(decode), "--prefill", str(prefill), "--profile", profile]
    arguments = ["--trace", trace, *cluster, "--load", str(load)]

    def of(name: str) -> list[str]:
        rebalances = name in PRESETS and PRESETS[name].moves
        return ["--preset", name, *(["--period", str(period)] if rebalances else [])]

    compiling = None
    if first_run:  # few requests: what is timed is the compilation
        with tempfile.TemporaryDirectory() as folder:
            few = [*arguments, "--requests", str(min(requests, 1000)), *of(names[-1])]
            compiling = run(few, Path(folder))
    full = [*arguments, "--requests", str(requests)]
    run([*arguments, "--requests", str(min(requests, 1000)), *of(names[-1])])  # compiled from here on
    with progress_display(Console(stderr=True), transient=True) as progress:
        runs = [run([*full, *of(name)]) for name in progress.track(names, description="simulating")]
    result = {
        "runs": runs,
        "first_run": compiling,
        "trace": Path(trace).name,
        "decode": decode,
        "prefill": prefill,
        "profile": profile,
        "period_s": period,
        **describe(),
    }
    text = json.dumps(result, indent=2)
    if json_path is not None and str(json_path) != "-":
        json_path.write_text(text + "\n", encoding="utf-8")
    elif json_path is not None:
        typer.echo(text)
    else:
        for one in runs:
            typer.echo(
                f"{one['preset']}: {one['requests']} requests in {one['wall_s']:.1f} s "
                f"({one['cpu_s']:.1f} s of CPU time), at most {one['peak_memory_bytes'] / 1e9:.2f} GB"
            )
        if compiling is not None:
            typer.echo(f"first run, compiling: {compiling['wall_s']:.1f} s ({compiling['cpu_s']:.1f} s)")
