"""`ares bench fidelity`: the simulator against runs that `ares bench live --runs` has written."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ares import extras
from ares.bench.environment import describe, write
from ares.bench.live import saved
from ares.bench.options import JsonFile
from ares.terminal import tables
from ares.terminal.errors import exit_with_error

_UNITS = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "end to end", "longest_gap_s": "longest gap"}


def command(
    files: Annotated[list[Path], typer.Argument(help="Files of `ares bench live --runs`.")],
    predictor: Annotated[
        str | None,
        typer.Option(
            help="Error model, as of `ares simulate --predictor`, where the engines predicted; by default one is "
            "fitted to the predictions of the run."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, help="How often each run is simulated.")] = 20,
    json_file: JsonFile = None,
) -> None:
    """Simulate recorded runs from their arrivals, lengths and fitted cost models; show the error of each figure.

    The table takes the runs of a preset in one file together; the JSON also has each run. Give runs under different
    loads in separate files.
    """
    extras.require("numba")
    from ares.bench.live import fidelity

    loads = []
    for file in files:
        try:
            read = saved.read_runs(file)
            result = fidelity.compare(read.runs, predictor, seeds)
        except ValueError as error:
            exit_with_error(str(error) if str(file) in str(error) else f"{file}: {error}")
        tables.show(f"{file.name}: {len(read.runs)} runs, {seeds} seeds")
        show(result)
        loads.append({"file": file.name, "about": read.about, **result})
    write({"benchmark": "fidelity", **describe(), "loads": loads}, json_file)


def show(result: dict[str, Any]) -> None:
    """Print what `fidelity.compare` returned, or why the runs could not be simulated."""
    if "refused" in result:
        tables.show(f"not simulated: {result['refused']}")
        return
    tables.show(*(_table(entry) for entry in result["presets"]))


def _table(entry: dict[str, Any]) -> Table:
    title = f"{entry['preset']}: {entry['runs']} runs, measured and simulated"
    made = tables.table("figure", "measured", "simulated", "error", "95 % of\nseeds", "within", title=title)
    for name, figure in entry["figures"].items():
        if name in _UNITS:
            for statistic, one in figure.items():
                made.add_row(f"{_UNITS[name]} {statistic}, s", *_cells(one, ".4g"))
        else:
            made.add_row(name, *_cells(figure, ".1f"))
    return made


def _cells(one: dict[str, Any], form: str) -> tuple[str, ...]:
    return (
        format(one["measured"], form),
        format(one["simulated"], form),
        "" if one["error"] is None else f"{one['error']:+.1%}",
        f"{one['low']:{form}} to {one['high']:{form}}",
        "yes" if one["within"] else "NO",
    )
