"""An error model from an evaluation of a real predictor, as `ares predictor evaluate --json` writes it.

Taken from the file are, for the first model in it, the mean absolute errors at 0, 25, 50 and 75 % of the outputs, in
tokens and relative to the mean of what remained there. A log-normal error of deviation sigma has a relative mean
absolute error of exp(sigma^2 / 2) erf(sigma / sqrt 2): that gives a sigma for each position.
"""

import math
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, field_validator

from ares.simulator.error_models import ErrorModel

FRACTIONS = (0.0, 0.25, 0.5, 0.75)
_LEAST_SIGMA = 1e-3  # of a predictor without error: zero has no logarithm
_MOST_SIGMA = 6.0  # above that of every error that is accepted
_MOST_TOKENS = 1e9


class _Position(BaseModel):
    mae: float = Field(ge=0, le=_MOST_TOKENS, allow_inf_nan=False)
    relative_mae: float = Field(ge=0, le=1e6, allow_inf_nan=False)


class _Positions(BaseModel):
    start: _Position = Field(alias="0%")
    quarter: _Position = Field(alias="25%")
    half: _Position = Field(alias="50%")
    late: _Position = Field(alias="75%")


class _Model(BaseModel):
    by_position: _Positions


class Evaluation(BaseModel):
    """What is read of the file."""

    models: Annotated[list[_Model], Field(min_length=1)]

    @field_validator("models", mode="before")
    @classmethod
    def _first(cls, models: Any) -> Any:
        """Ignore all models but the first: it is the predictor, the others are baselines."""
        return models[:1] if isinstance(models, list) else models

    def relative_errors(self) -> list[float]:
        """Return the relative mean absolute error of the first model at each of FRACTIONS."""
        at = self.models[0].by_position
        return [place.relative_mae for place in (at.start, at.quarter, at.half, at.late)]

    def mean_output(self) -> float:
        """Return the mean length of the outputs in tokens; ValueError where their beginnings do not tell it."""
        start = self.models[0].by_position.start
        mean = start.mae / start.relative_mae if start.relative_mae > 0 else 0.0
        if not 1.0 <= mean <= _MOST_TOKENS:
            raise ValueError("models.0.by_position.0%: mae / relative_mae must be the mean output, at least one token")
        return mean


def relative_error(sigma: float) -> float:
    """Return the mean of |exp(sigma z) - 1| over a standard normal z."""
    return math.exp(sigma * sigma / 2.0) * math.erf(sigma / math.sqrt(2.0))


def sigma_of(error: float) -> float:
    """Return the sigma whose relative mean absolute error this is, within 0.001 and 6."""
    low, high = _LEAST_SIGMA, _MOST_SIGMA
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if relative_error(middle) < error else (low, middle)
    return low


def fitted(name: str, fields: Any) -> ErrorModel:
    """Fit start, end and decay of sigma to an evaluation, by least squares of its logarithm.

    Neither start nor end lies beyond what was measured, and the decay is between a sixteenth of the mean output and
    all of it: four positions cannot tell more.

    Raises
    ------
    ValueError
        A number that is needed is missing from the file, or out of range; the message names it.
    """
    from scipy.optimize import least_squares

    evaluation = Evaluation.model_validate(fields)
    output = evaluation.mean_output()
    measured = np.log([sigma_of(error) for error in evaluation.relative_errors()])
    position = output * np.array(FRACTIONS)

    def residuals(logarithms: NDArray[np.float64]) -> NDArray[np.float64]:
        start, end, tokens = np.exp(logarithms)
        difference: NDArray[np.float64] = np.log(end + (start - end) * np.exp(-position / tokens)) - measured
        return difference

    margin = 1e-9  # the solver needs a lower bound below the upper one
    bounds = np.array([[measured.min() - margin, measured.max() + margin]] * 2 + [np.log([output / 16.0, output])]).T
    begin = np.clip([measured[0], measured[-1], math.log(output / 4.0)], bounds[0], bounds[1])
    start, end, tokens = np.exp(least_squares(residuals, begin, bounds=tuple(bounds), xtol=1e-12).x)
    return ErrorModel(name, float(start), float(end), float(tokens), mean_output=output)
