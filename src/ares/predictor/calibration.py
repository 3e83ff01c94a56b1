"""Calibration: quantile levels that cover the share that they state, fitted on the validation prompts.

Where F is the predicted distribution, F(y) of calibrated forecasts is uniform. The level that is to cover a share q is
therefore the q-quantile of F(y) over validation pairs (isotonic recalibration, Kuleshov et al. 2018). Only the levels
at which a network reads its own distribution change, so that serving runs the same code.
"""

from typing import Any

import numpy as np
import torch

from ares.predictor import hazard
from ares.predictor.metrics import Array


def transform(ended: torch.Tensor, grid: torch.Tensor, remaining: Array, room: Array) -> tuple[Array, Array]:
    """Return [pairs] P(Y < y) and [pairs] P(Y <= y), where y is the truth and Y is bounded by the room.

    Parameters
    ----------
    ended
        [pairs, bins + 1] as `hazard.cumulative` gives it.
    """
    edges = grid.numpy().astype(float)

    def before(lengths: Array) -> Array:
        """Return P(Y < length), all lengths of a bin being equally likely."""
        index = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, len(edges) - 2)
        part = np.clip((lengths - edges[index]) / (edges[index + 1] - edges[index]), 0, 1)
        table, rows = ended.numpy().astype(float), np.arange(len(lengths))
        result: Array = table[rows, index] * (1 - part) + table[rows, index + 1] * part
        return result

    return before(remaining), np.where(remaining >= room, 1.0, before(remaining + 1))


def levels(below: Array, within: Array) -> torch.Tensor:
    """Return the levels at which to read quantiles so that they cover `hazard.LEVELS` of these pairs.

    Parameters
    ----------
    below, within
        [pairs] as `transform` gives them. What falls between the two counts in proportion: the limit holds a share of
        the probability in one number (see `metrics.covered_fairly`).
    """
    tried = np.linspace(0.001, 0.999, 999)
    width = np.maximum(within - below, 1e-9)
    cover = [np.clip((level - below) / width, 0, 1).mean() for level in tried]
    found: Any = np.interp(hazard.LEVELS, np.maximum.accumulate(cover), tried)
    return torch.tensor(found, dtype=torch.float32)
