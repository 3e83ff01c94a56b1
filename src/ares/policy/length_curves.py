"""Length curves: how long outputs become, for requests of which something is known, and for all.

What is known of a request is a chain of cells, from the general to the particular: all requests, those whose prompts
begin with the same 16 tokens, with the same 64, and so on. Each cell has a curve: the share of its outputs that are
longer than a number of tokens. A cell with few outputs keeps close to the curve of the cell above it, its parent,
which counts as `SHRINKAGE` outputs more; an output that was cut counts as longer than it became. That is the
estimator of Susarla and Van Ryzin (1976): without cut outputs it is (n F + m F_parent) / (n + m), with n outputs of the
cell and m = SHRINKAGE, and with m = 0 that of Kaplan and Meier.

Lengths are counted in bins, one token wide at first and then 5 % wider each. Plain array code that its callers compile
where numba is installed: the gateway (gateway/control/lengths.py) and the simulator (simulator/prediction.py).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

F8 = NDArray[np.float64]
I8 = NDArray[np.int64]

SHRINKAGE = 8.0
"""As how many outputs of its own the parent's curve counts for a cell."""
ALL = 0
"""The cell of all requests."""
ENDED_TO_RUNNING = 8
"""So many outputs must have ended for each request that runs before other cells than that of all count.

The first outputs to end are the short ones. The ratio is that of the time that a gateway has run to the mean time of a
request.
"""

# Bins one token wide, and bins in all; the last one has all lengths above 2 ** 20.
_NARROW, _BINS = 48, 256
# Above so many outputs of a cell, each counts half: older ones lose weight.
_FULL, _FULL_OF_ALL = 512.0, 2000.0
# The curve above that of all requests, as so many outputs: after g tokens the mean of what follows is g, and at least
# this (as in residual_life.py).
_PRIOR_OUTPUTS = 1.0
_PRIOR_TOKENS = 256.0


def _last_of_bins() -> I8:
    narrow = np.arange(1, _NARROW + 1)
    wide = np.geomspace(_NARROW, 1 << 20, _BINS - _NARROW + 1)[1:]
    last = np.concatenate([narrow, np.ceil(wide).astype(np.int64)])
    return np.maximum.accumulate(np.maximum(last, np.arange(1, _BINS + 1))).astype(np.int64)


LAST = _last_of_bins()
"""The greatest length in each bin, rising, shape (B,)."""


class Lengths(NamedTuple):
    """Outputs by their length, in C cells of B bins; older ones count less.

    Attributes
    ----------
    ended, cut
        Those that ended, and those that were cut, shape (C, B).
    outputs
        All of each cell, shape (C,).
    """

    ended: F8
    cut: F8
    outputs: F8


def make(cells: int) -> Lengths:
    """Return cells without outputs."""
    return Lengths(np.zeros((cells, len(LAST))), np.zeros((cells, len(LAST))), np.zeros(cells))


def clear(lengths: Lengths, cell: int) -> None:
    """Make a cell empty."""
    lengths.ended[cell] = 0.0
    lengths.cut[cell] = 0.0
    lengths.outputs[cell] = 0.0


def add(lengths: Lengths, cell: int, tokens: int, was_cut: bool) -> None:
    """Add an output to a cell.

    Parameters
    ----------
    tokens
        Its length.
    was_cut
        Whether it would have become longer, but for a limit or an end from outside.
    """
    place = min(int(np.searchsorted(LAST, tokens)), len(LAST) - 1)
    if lengths.outputs[cell] >= (_FULL_OF_ALL if cell == ALL else _FULL):
        lengths.ended[cell] *= 0.5
        lengths.cut[cell] *= 0.5
        lengths.outputs[cell] *= 0.5
    if was_cut:
        lengths.cut[cell, place] += 1.0
    else:
        lengths.ended[cell, place] += 1.0
    lengths.outputs[cell] += 1.0


def compose(lengths: Lengths, cells: I8, longer: F8) -> None:
    """Compute the curve of requests that belong to some cells, from the general to the particular.

    Parameters
    ----------
    cells
        Their indices; each cell's curve is drawn towards that of the cells before it, shape (K,).
    longer
        The result: the share of outputs that are longer than each bin, never rising, shape (B,).
    """
    start = 0
    share = 1.0
    for place in range(len(LAST)):
        share *= math.exp(-(LAST[place] - start) / max(_PRIOR_TOKENS, float(start)))
        longer[place] = share
        start = LAST[place]
    weight = _PRIOR_OUTPUTS
    for cell in cells:
        at_risk, share, share_above = lengths.outputs[cell], 1.0, 1.0
        for place in range(len(LAST)):
            risk = at_risk + weight * share_above
            ends = lengths.ended[cell, place] + weight * (share_above - longer[place])
            share_above = longer[place]
            share *= max(1.0 - ends / risk, 0.0) if risk > 0.0 else 0.0
            longer[place] = share
            at_risk = max(at_risk - lengths.ended[cell, place] - lengths.cut[cell, place], 0.0)
        weight = SHRINKAGE


def expect(longer: F8, generated: int, levels: tuple[float, ...], quantiles: F8) -> None:
    """Write quantiles of the tokens that follow `generated` ones.

    Parameters
    ----------
    longer
        A curve, as `compose` makes it, shape (B,).
    levels
        Levels of the quantiles, between 0 and 1, rising, Q of them.
    quantiles
        The result, tokens, at least 1, shape (Q,).
    """
    final = len(LAST) - 1
    place = min(int(np.searchsorted(LAST, generated)), final)
    start, above = (LAST[place - 1], longer[place - 1]) if place else (0, 1.0)
    inside = min(max((generated - start) / (LAST[place] - start), 0.0), 1.0)
    alive = above - (above - longer[place]) * inside
    for index in range(len(levels)):
        wanted = alive * (1.0 - levels[index])
        low, high = place, final
        while low < high:
            middle = (low + high) // 2
            if longer[middle] <= wanted:
                high = middle
            else:
                low = middle + 1
        start, above = (LAST[low - 1], longer[low - 1]) if low else (0, 1.0)
        ending = above - longer[low]
        part = min(max((above - wanted) / ending, 0.0), 1.0) if ending > 0.0 else 1.0
        # The lengths in a bin are equally likely: the smallest one that reaches the level.
        length = start + math.ceil(part * (LAST[low] - start) - 1e-9)
        quantiles[index] = float(max(length - generated, 1))
