"""Load curves: P99 TPOT, TTFT, goodput and preemptions against load, one line a preset, with 95 % intervals."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ares.terminal.output_files import check_writable

mpl.use("Agg")

# Colours that stay apart for colour-blind readers (Okabe and Ito).
COLOURS = ("#999999", "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_PANELS: tuple[tuple[str, tuple[str, ...], float, bool], ...] = (
    ("P99 TPOT, ms", ("tpot_s", "p99"), 1e3, True),
    ("P50 TTFT, s", ("ttft_s", "p50"), 1.0, True),
    ("P99 TTFT, s", ("ttft_s", "p99"), 1.0, True),
    ("goodput, requests/s", ("goodput_rps",), 1.0, False),
    ("requests that meet both SLOs", ("slo_share",), 1.0, False),
    ("preemptions", ("preemptions",), 1.0, False),
)


def _read(point: dict[str, Any], path: tuple[str, ...]) -> tuple[float, float]:
    if len(path) == 2:
        return float(point[path[0]][path[1]]), float(point[path[0]].get(f"{path[1]}_ci", 0.0))
    return float(point[path[0]]), float(point.get(f"{path[0]}_ci", 0.0))


def figure(points: list[dict[str, Any]], slo: dict[str, float]) -> Figure:
    """Draw the six panels."""
    drawn = Figure(figsize=(12, 6.5), layout="constrained")
    panels = drawn.subplots(2, 3)
    names = list(dict.fromkeys(point["preset"] for point in points))
    for axes, (title, path, factor, logarithmic) in zip(panels.flat, _PANELS, strict=True):
        for number, name in enumerate(names):
            rows = sorted((p for p in points if p["preset"] == name), key=lambda p: float(p["load"]))
            load = np.array([row["load"] for row in rows])
            values = np.array([_read(row, path) for row in rows]) * factor
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(load, values[:, 0], marker="o", markersize=3, label=name, color=colour)
            low = values[:, 0] - values[:, 1]
            low = np.maximum(low, values[:, 0] * 0.2) if logarithmic else np.maximum(low, 0.0)
            axes.fill_between(load, low, values[:, 0] + values[:, 1], alpha=0.15, color=colour, linewidth=0)
        if logarithmic:
            axes.set_yscale("log")
        if path[0] in slo:
            axes.axhline(slo[path[0]] * factor, color="red", linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("load (1 = capacity)", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    panels.flat[0].legend(fontsize=8)
    return drawn


def check_plot(path: Path) -> None:
    """Raise ValueError or OSError where nothing could be drawn into a file, before there is anything to draw."""
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"{path}: unknown kind of picture; known suffixes: {', '.join(sorted(known))}")
    check_writable(path)


def load_curves(points: list[dict[str, Any]], slo: dict[str, float], path: Path) -> None:
    """Draw the curves into a file; its suffix names the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "ares"}):  # the same numbers give the same file
        figure(points, slo).savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
