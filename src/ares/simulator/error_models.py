"""Models of prediction error for the simulated predictor."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ErrorModel:
    """Log-normal error of the predicted remaining length, which changes with the tokens generated; or no predictor.

    Attributes
    ----------
    name
        What the reports call it.
    start, end
        Standard deviation of the logarithm at the end of prefill, and far into the generation.
    tokens
        Generated tokens over which the excess of `start` over `end` falls to 1/e.
    predicts
        False: rows carry no prediction at all.
    residual_life
        No model predicts: remaining lengths are estimated from recent outputs (policy/residual_life.py).
    by_cells
        With `residual_life`: by what is known of a request (policy/length_curves.py), not by all outputs alike.
    mean_output
        Mean output length of the evaluation that `tokens` was measured in; None: `tokens` holds for every workload.
    """

    name: str
    start: float
    end: float
    tokens: float
    predicts: bool = True
    residual_life: bool = False
    by_cells: bool = False
    mean_output: float | None = None

    def tokens_at(self, mean_output: float) -> float:
        """Return `tokens` for a workload: what was measured halfway through an output holds halfway through its own."""
        return self.tokens if self.mean_output is None else self.tokens * mean_output / self.mean_output


ERROR_MODELS = {
    "exact": ErrorModel("exact", 0.0, 0.0, 1.0),
    "none": ErrorModel("none", 0.0, 0.0, 1.0, predicts=False),
    # What the gateway uses for a model without a predictor, and what it can use (`Tuning.length_curves`).
    "residual-life": ErrorModel("residual-life", 0.0, 0.0, 1.0, residual_life=True),
    "length-curves": ErrorModel("length-curves", 0.0, 0.0, 1.0, residual_life=True, by_cells=True),
    # Shrinks as continuous re-prediction does. Milder than the paper at the start (docs/simulator.md).
    "continuous": ErrorModel("continuous", 0.9, 0.12, 3500.0),
    "noise-30": ErrorModel("noise-30", 0.3, 0.3, 1.0),
    "noise-60": ErrorModel("noise-60", 0.6, 0.6, 1.0),
    "noise-100": ErrorModel("noise-100", 1.0, 1.0, 1.0),
}
