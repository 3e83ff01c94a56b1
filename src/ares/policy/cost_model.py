"""Laws fitted online: a non-negative linear law from a stream of observations that forgets the old ones."""

import numpy as np

from ares.policy.cluster import FloatArray

_RIDGE = 1e-4  # of each feature's own mean square: settles what the observations do not tell apart


class OnlineLeastSquares:
    """Fits y = x . c with c >= 0 by least squares.

    Relative errors count: an observation weighs 1 / y^2, so that fast steps are matched as well as slow ones.

    Parameters
    ----------
    features
        Length of x.
    forgetting
        Weight of an observation relative to the one after it.
    minimum
        Observations before there is a law.
    """

    def __init__(self, features: int, forgetting: float = 0.998, minimum: int = 20) -> None:
        self._forgetting = forgetting
        self._minimum = minimum
        self._count = 0
        self._moments = np.zeros((features, features))
        self._products = np.zeros(features)
        self._law: FloatArray | None = None

    def add(self, x: FloatArray, y: float) -> None:
        """Take an observation in; one that is not finite and positive is dropped."""
        if not (np.isfinite(x).all() and np.isfinite(y) and y > 0.0):
            return
        scaled = x / y
        self._moments = self._forgetting * self._moments + np.outer(scaled, scaled)
        self._products = self._forgetting * self._products + scaled
        self._count += 1
        self._law = None

    @property
    def law(self) -> FloatArray | None:
        """The coefficients, shape (features,); None before there are enough observations."""
        if self._law is None and self._count >= self._minimum:
            self._law = self._solve()
        return self._law

    def _solve(self) -> FloatArray:
        """Solve the normal equations; what comes out negative is left out, the most negative first."""
        active = np.flatnonzero(np.diag(self._moments) > 0.0)
        law = np.zeros(len(self._products))
        while len(active):
            moments = self._moments[np.ix_(active, active)]
            solved = np.linalg.solve(moments + np.diag(_RIDGE * np.diag(moments)), self._products[active])
            if (solved >= 0.0).all():
                law[active] = solved
                break
            active = np.delete(active, int(np.argmin(solved)))
        return law
