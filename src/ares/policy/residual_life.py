"""Residual life: without a predictor, a request goes on as outputs that ended lately did once they had come as far.

Plain array code, compiled where numba is installed by those who call it often: the gateway (gateway/control/lengths.py)
and the simulator (simulator/prediction.py). Neither has a rule of its own.
"""

import math

import numpy as np
from numpy.typing import NDArray

F8 = NDArray[np.float64]
I8 = NDArray[np.int64]

REMEMBERED = 2000
"""Outputs that are remembered: the newest."""
# Fewer outputs that went on for longer say too little about a request that has come as far.
_ENOUGH = 16
# Until then, a request is expected to go on about as long as it has, and this long at least.
_PRIOR_TOKENS = 256.0


def remember(lately: I8, ordered: I8, ended: int, tokens: int) -> None:
    """Note the length of an output that has ended, and forget the oldest where there is no place left.

    Parameters
    ----------
    lately, ordered
        Lengths of the newest outputs in the order in which they ended (a ring), and sorted; both of shape (N,).
    ended
        How many outputs had ended before this one.
    tokens
        The length of this one.
    """
    held = min(ended, len(lately))
    place = ended % len(lately)
    if held == len(lately):
        held -= 1
        oldest = np.searchsorted(ordered, lately[place])
        ordered[oldest:held] = ordered[oldest + 1 : held + 1]
    at = np.searchsorted(ordered[:held], tokens, side="right")
    ordered[at + 1 : held + 1] = ordered[at:held]
    ordered[at] = tokens
    lately[place] = tokens


def expect(ordered: I8, ended: int, generated: int, levels: tuple[float, ...], quantiles: F8) -> None:
    """Write quantiles of the tokens that follow `generated` ones.

    Parameters
    ----------
    ordered
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
    held = ordered[: min(ended, len(ordered))]
    first = np.searchsorted(held, generated, side="right")
    longer = len(held) - first
    for index in range(len(levels)):
        if longer < _ENOUGH:
            quantiles[index] = -max(_PRIOR_TOKENS, float(generated)) * math.log1p(-levels[index])
        else:
            quantiles[index] = float(held[first + int(levels[index] * (longer - 1))] - generated)
