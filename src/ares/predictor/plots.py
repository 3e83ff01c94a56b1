"""Pictures of an evaluation: error against position, predicted against true, calibration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ares.predictor import metrics
from ares.predictor.dataset import Pairs
from ares.predictor.errors import PredictorError
from ares.predictor.evaluation import Evaluated
from ares.predictor.hazard import LEVELS


def draw(folder: Path, evaluated: Sequence[Evaluated], test: Pairs, report: dict[str, Any]) -> list[Path]:
    """Write the pictures into a folder and return them; PredictorError without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise PredictorError("--report needs matplotlib: pip install '.[predictor]' in ARES's checkout") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    remaining = test.remaining.astype(float)
    skipped = ", ".join(one["baseline"] for one in report["skipped"])
    title = f"not compared: {skipped}" if skipped else ""

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for model in report["models"]:
        values = [part["mae"] for part in model["by_position"].values()]
        axes.plot(list(model["by_position"]), values, marker="o", label=model["name"])
    axes.set(xlabel="part of the generation", ylabel="mean absolute error (tokens)", ylim=(0, None))
    axes.set_title(title, fontsize="small")
    axes.legend(fontsize="small")
    written = [_save(figure, folder / "error-by-position.png")]

    figure, axes = plt.subplots(figsize=(5, 5))
    median = metrics.at_level(evaluated[0].quantiles, 0.5)
    top = float(remaining.max())
    axes.plot([0, top], [0, top], color="0.6", linewidth=1)
    axes.scatter(remaining, median, s=4, alpha=0.25, linewidths=0)
    axes.set(xlabel="true remaining tokens", ylabel=f"median predicted by {evaluated[0].name}")
    written.append(_save(figure, folder / "predicted-against-true.png"))

    figure, axes = plt.subplots(figsize=(5, 5))
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    wanted = np.array(LEVELS[1:-1])
    room = test.room.astype(float)
    for model in evaluated:
        seen = [metrics.covered_fairly(model.quantiles, remaining, room, level).mean() for level in wanted]
        axes.plot(wanted, seen, marker=".", label=model.name)
    axes.set(xlabel="predicted level", ylabel="share of outputs at or below it")
    axes.set_title(title, fontsize="small")
    axes.legend(fontsize="small")
    written.append(_save(figure, folder / "calibration.png"))
    return written


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
