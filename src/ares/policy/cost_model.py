"""Linear cost models with non-negative coefficients, fitted online; old observations lose weight."""

from typing import TypeVar

import numpy as np

from ares.policy.cluster import FloatArray

_RIDGE = 1e-4  # of each feature's own mean square: decides between features that the observations cannot separate
# Objective of the time per token where none is set: so many times a step at full memory.
_TPOT_IN_FULL_STEPS = 1.5
Seconds = TypeVar("Seconds", float, FloatArray)


def default_tpot_s(base_s: Seconds, token_s: Seconds, capacity_tokens: Seconds) -> Seconds:
    """Return the objective of the time per token of a request without one of its own, by a step at full memory.

    Parameters
    ----------
    base_s, token_s
        Seconds of a step without any request, and of each token of KV in it; of one instance or of several.
    capacity_tokens
        KV capacity in tokens, likewise.
    """
    return _TPOT_IN_FULL_STEPS * (base_s + token_s * capacity_tokens)


class OnlineLeastSquares:
    """Fits y = x . c with c >= 0 by least squares.

    Relative errors are minimised: an observation weighs 1 / y^2, so that fast steps are matched as well as slow ones.

    Parameters
    ----------
    features
        Length of x.
    forgetting
        Weight of an observation relative to the one after it.
    minimum
        Observations before there are coefficients.
    """

    def __init__(self, features: int, forgetting: float = 0.998, minimum: int = 20) -> None:
        self._forgetting = forgetting
        self._minimum = minimum
        self._count = 0
        self._moments = np.zeros((features, features))
        self._products = np.zeros(features)
        self._coefficients: FloatArray | None = None

    def add(self, x: FloatArray, y: float) -> None:
        """Add an observation; one that is not finite and positive is dropped."""
        if not (np.isfinite(x).all() and np.isfinite(y) and y > 0.0):
            return
        scaled = x / y
        self._moments = self._forgetting * self._moments + np.outer(scaled, scaled)
        self._products = self._forgetting * self._products + scaled
        self._count += 1
        self._coefficients = None

    @property
    def coefficients(self) -> FloatArray | None:
        """The coefficients, shape (features,); None before there are enough observations."""
        if self._coefficients is None and self._count >= self._minimum:
            self._coefficients = self._solve()
        return self._coefficients

    def _solve(self) -> FloatArray:
        """Solve the normal equations; negative coefficients are set to zero, the most negative first."""
        active = np.flatnonzero(np.diag(self._moments) > 0.0)
        coefficients = np.zeros(len(self._products))
        while len(active):
            moments = self._moments[np.ix_(active, active)]
            solved = np.linalg.solve(moments + np.diag(_RIDGE * np.diag(moments)), self._products[active])
            if (solved >= 0.0).all():
                coefficients[active] = solved
                break
            active = np.delete(active, int(np.argmin(solved)))
        return coefficients
