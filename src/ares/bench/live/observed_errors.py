"""An error model fitted to the predictions that the engines made in a run, against the final lengths."""

import numpy as np
from numpy.typing import NDArray

from ares.bench.live.saved import SavedRun
from ares.simulator.error_models import ErrorModel

# Mean of |z| of a standard normal.
_MEAN_DEVIATION = float(np.sqrt(2.0 / np.pi))
# Fewest predictions for a fit.
_LEAST = 20
_LARGEST_SIGMA = 6.0


def observed_errors(run: SavedRun) -> ErrorModel:
    """Fit sigma(n) = end + (start - end) exp(-n / tokens), n tokens generated, to |log(predicted median / truth)|.

    Raises
    ------
    ValueError
        The run shows too few predictions.
    """
    from scipy.optimize import least_squares

    lengths = {request.name: len(request.ticks) for request in run.requests}
    pairs = [
        (seen.output_tokens, abs(np.log(max(seen.remaining, 1.0) / (lengths[name] - seen.output_tokens))))
        for sample in run.samples
        for name, seen in sample.where.items()
        if seen.remaining is not None and lengths.get(name, 0) > seen.output_tokens
    ]
    if len(pairs) < _LEAST:
        raise ValueError(f"{run.preset}: {len(pairs)} predictions were seen, too few to fit their errors")
    generated, error = np.array(pairs, dtype=float).T
    mean = float(np.mean(list(lengths.values())))

    def off(logarithms: NDArray[np.float64]) -> NDArray[np.float64]:
        start, end, tokens = np.exp(logarithms)
        left: NDArray[np.float64] = (end + (start - end) * np.exp(-generated / tokens)) * _MEAN_DEVIATION - error
        return left

    bounds = np.log([[1e-3, 1e-3, mean / 16.0], [_LARGEST_SIGMA, _LARGEST_SIGMA, 4.0 * mean]])
    usual = float(np.clip(error.mean() / _MEAN_DEVIATION, 2e-3, _LARGEST_SIGMA / 2.0))
    begin = np.log([usual, usual, mean / 2.0])
    start, end, tokens = np.exp(least_squares(off, begin, bounds=bounds).x)
    return ErrorModel("observed", float(start), float(end), float(tokens))
