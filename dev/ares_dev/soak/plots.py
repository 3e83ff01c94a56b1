"""The picture of a soak: each figure of each process over time; dots where no request ran."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from ares_dev.soak.growth import series
from ares_dev.soak.samples import Sample

mpl.use("Agg")
# Colours that colour-blind readers can tell apart (Okabe and Ito).
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_SHOWN = ("rss_mb", "pss_mb", "descriptors", "threads", "kv_blocks_used", "pinned", "running", "tasks")


def draw(samples: list[Sample], file: Path) -> None:
    """Draw each figure that is counted everywhere, one panel a figure and one line a part."""
    names = sorted({name for each in samples for name in each.values})
    drawn = Figure(figsize=(13, 10), layout="constrained")
    panels: Any = drawn.subplots(4, 2, sharex=True)
    for axes, figure in zip(panels.flat, _SHOWN, strict=True):
        parts = [name for name in names if name.rpartition("/")[2] == figure]
        for colour, name in zip(_COLOURS, parts, strict=False):
            times, values = series(samples, name, idle=False)
            axes.plot([t / 60 for t in times], values, color=colour, lw=1, label=name.rpartition("/")[0])
            times, values = series(samples, name, idle=True)
            axes.plot([t / 60 for t in times], values, ".", color=colour)
        axes.set_title(figure.replace("_", " "), fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    for axes in panels[-1]:
        axes.set_xlabel("minutes")
    drawn.savefig(file)
