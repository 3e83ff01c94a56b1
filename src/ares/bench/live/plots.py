"""Pictures of a comparison: TPOT and TTFT distributions, and KV use over time."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ares.bench.live.client import Observed, Run

mpl.use("Agg")
# Colours that colour-blind readers can tell apart (Okabe and Ito).
_COLOURS = ("#999999", "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7")


def _tpot(seen: Observed) -> float:
    return seen.tpot_s


def _ttft(seen: Observed) -> float:
    return seen.ttft_s


def draw(runs: list[Run], file: Path) -> None:
    """Draw all runs into one file: above the distributions, below KV use of each preset's first run."""
    names = list(dict.fromkeys(run.preset for run in runs))
    drawn = Figure(figsize=(4 * max(len(names), 2), 7), layout="constrained")
    parts: Any = drawn.subfigures(2, 1)
    above, below = parts
    for axes, (title, unit, read) in zip(
        above.subplots(1, 2),
        (
            ("time per output token", 1e3, _tpot),
            ("time to first token", 1.0, _ttft),
        ),
        strict=True,
    ):
        for colour, name in zip(_COLOURS, names, strict=False):
            values = [
                read(seen) * unit for run in runs if run.preset == name for seen in run.requests if seen.error is None
            ]
            axes.plot(np.sort(values), np.linspace(0, 100, len(values)), label=name, color=colour)
        axes.set_xscale("log")
        axes.set_xlabel(f"{title}, {'ms' if unit > 1 else 's'}")
        axes.set_ylabel("requests at or below, %")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    for axes, name in zip(np.atleast_1d(below.subplots(1, len(names), sharey=True)), names, strict=True):
        run = next(run for run in runs if run.preset == name)
        at = [sample["at_s"] for sample in run.samples]
        for number, instance in enumerate(zip(*(sample["kv"] for sample in run.samples), strict=True)):
            axes.plot(at, np.array(instance) * 100, color=_COLOURS[2 + number % 4], label=f"decode-{number}")
        axes.set_title(f"{name}: {run.preemptions} preemptions", fontsize=9)
        axes.set_xlabel("s")
        axes.set_ylabel("KV in use, %")
        axes.set_ylim(0, 105)
        axes.grid(alpha=0.25)
    drawn.savefig(file)
