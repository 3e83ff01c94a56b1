"""Residual life: without a predictor, remaining lengths are estimated from recent outputs that were at least as long.

Plain array code that its callers compile where numba is installed: the gateway (gateway/control/lengths.py) and the
simulator (simulator/prediction.py). Neither has a rule of its own.
"""

import math

import numpy as np
from numpy.typing import NDArray

F8 = NDArray[np.float64]
I8 = NDArray[np.int64]

REMEMBERED = 2000
"""How many of the newest outputs are kept."""
# Fewer longer outputs than these are too few to estimate from.
_ENOUGH = 16
# Then the mean of the remaining tokens is taken to be the tokens generated so far, and at least this.
_PRIOR_TOKENS = 256.0


def remember(recent: I8, sorted_lengths: I8, ended: int, tokens: int) -> None:
    """Add the length of an output that has ended, in place of the oldest where there is no room left.

    Parameters
    ----------
    recent, sorted_lengths
        Lengths of the newest outputs in the order in which they ended (a ring), and sorted, shape (N,) each.
    ended
        How many outputs had ended before this one.
    tokens
        The length of this one.
    """
    known = min(ended, len(recent))
    place = ended % len(recent)
    if known == len(recent):
        known -= 1
        oldest = np.searchsorted(sorted_lengths, recent[place])
        for index in range(oldest, known):
            sorted_lengths[index] = sorted_lengths[index + 1]
    at = np.searchsorted(sorted_lengths[:known], tokens, side="right")
    for index in range(known, at, -1):
        sorted_lengths[index] = sorted_lengths[index - 1]
    sorted_lengths[at] = tokens
    recent[place] = tokens


def expect(sorted_lengths: I8, ended: int, generated: int, levels: tuple[float, ...], quantiles: F8) -> None:
    """Write quantiles of the tokens that follow `generated` ones.

    Parameters
    ----------
    sorted_lengths
        Sorted lengths, as `remember` keeps them, shape (N,).
    ended
        How many outputs have ended.
    generated
        Tokens that the request has generated.
    levels
        Levels of the quantiles, between 0 and 1, Q of them.
    quantiles
        The result, tokens, shape (Q,).
    """
    known = sorted_lengths[: min(ended, len(sorted_lengths))]
    first = np.searchsorted(known, generated, side="right")
    longer = len(known) - first
    for index in range(len(levels)):
        if longer < _ENOUGH:
            quantiles[index] = -max(_PRIOR_TOKENS, float(generated)) * math.log1p(-levels[index])
        else:
            quantiles[index] = float(known[first + int(levels[index] * (longer - 1))] - generated)
