"""The mock predictor: the true remaining length with the error of the simulator's models.

The formula of simulator/prediction.py with a constant sigma; drawn by the hash of the request's own prompt, so that an
error stays with a request when it moves.
"""

import math

from ares.mock_engine.model import normal

_Z90 = 1.2815515655446004
_EPOCH = 512  # generated tokens between two independent draws of the error


class MockPredictor:
    """Predicts remaining lengths; a `sigma` of None predicts nothing, one of 0 is exact.

    `sigma` is the standard deviation of the logarithm of the predicted median over the truth.
    """

    def __init__(self, sigma: float | None) -> None:
        self.sigma = sigma
        self._factors: dict[tuple[int, int], float] = {}

    def describe(self) -> str:
        """Return its description for `/version`."""
        if self.sigma is None:
            return "none"
        return f"mock: the true remaining length, log-normal error of sigma {self.sigma:g}"

    def remaining(self, prompt_hash: int, generated: int, true: int, limit: int) -> tuple[float, float, float] | None:
        """Return quantiles of the tokens to come at messages.REMAINING_LEVELS.

        Parameters
        ----------
        prompt_hash
            Identifies the request wherever it runs.
        generated
            Tokens of output so far, on all instances.
        true, limit
            The true number of tokens to come, and the largest possible one.
        """
        if self.sigma is None:
            return None
        if self.sigma == 0.0:
            exact = float(max(1, true))
            return exact, exact, exact
        median = true * self._factor(prompt_hash, 1 + generated // _EPOCH)
        spread = math.exp(_Z90 * self.sigma)
        low, middle, high = (max(1.0, min(value, float(limit))) for value in (median / spread, median, median * spread))
        return low, middle, high

    def _factor(self, prompt_hash: int, epoch: int) -> float:
        known = self._factors.get((prompt_hash, epoch))
        if known is None:
            if len(self._factors) > 1 << 14:
                self._factors.clear()
            z = 0.8 * normal(prompt_hash, 1) + 0.6 * normal(prompt_hash, 1 + epoch)
            known = self._factors[prompt_hash, epoch] = math.exp((self.sigma or 0.0) * z)
        return known
