"""The picture of a learning cluster: the error of curve, champion and challenger over time, and the pace of tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ares_dev.learning.run import Learned
from ares_dev.learning.traffic import Phase

mpl.use("Agg")
# Colours that colour-blind readers can tell apart (Okabe and Ito).
_COLOURS = {"curve": "#000000", "champion": "#0072B2", "challenger": "#D55E00"}
_WINDOW_S = 120.0


def draw(learned: Learned, phases: Sequence[Phase], file: Path) -> None:
    """Draw the losses that the learner reported, the TPOT that clients saw, and preemptions; lines at swaps."""
    drawn = Figure(figsize=(11, 9), layout="constrained")
    panels: Any = drawn.subplots(3, 1, sharex=True)
    losses = [entry for entry in learned.losses if entry["position"] == "all"]
    for name, colour in _COLOURS.items():
        points = [(entry["at_s"] / 60, entry[name]) for entry in losses if entry.get(name) is not None]
        if points:
            panels[0].plot(*zip(*sorted(points), strict=True), "o-", ms=3, color=colour, label=name)
    panels[0].set_ylabel("CRPS of remaining tokens")
    panels[0].legend()
    times, values = _moving(learned)
    panels[1].plot(times, values, color="#0072B2")
    panels[1].set_ylabel(f"P99 TPOT in ms, {_WINDOW_S / 60:g} min")
    samples = [sample for sample in learned.samples if "preemptions" in sample]
    panels[2].plot([s["at_s"] / 60 for s in samples], [s["preemptions"] for s in samples], color="#D55E00")
    panels[2].set_ylabel("preemptions so far")
    panels[2].set_xlabel("minutes")
    begins = 0.0
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        for at, version in learned.swapped_at():
            axes.axvline(at / 60, color="#009E73", ls="--", label=version[:8])
    for phase in phases:
        panels[0].axvline(begins / 60, color="#999999", lw=1)
        panels[0].text(begins / 60, panels[0].get_ylim()[1], f" {phase.name}", va="top", fontsize=9)
        begins += phase.seconds
    drawn.savefig(file)


def _moving(learned: Learned) -> tuple[list[float], list[float]]:
    """Return the P99 of TPOT of the requests that arrived in each window, in ms, by minutes."""
    several = [one for _, one in learned.requests if one.error is None and len(one.tokens) > 1]
    ends = np.arange(_WINDOW_S, learned.span_s, _WINDOW_S / 4)
    points = []
    for end in ends:
        inside = [one.tpot_s for one in several if end - _WINDOW_S <= one.at_s < end]
        if inside:
            points.append((float(end) / 60, float(np.percentile(inside, 99)) * 1000))
    return [at for at, _ in points], [value for _, value in points]
