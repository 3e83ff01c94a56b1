"""Models of prediction error for the simulated predictor."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ares.text_files import TextFileError, read_text


@dataclass(frozen=True, slots=True)
class ErrorModel:
    """Log-normal error of the predicted remaining length that shrinks as a request goes on.

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
    """

    name: str
    start: float
    end: float
    tokens: float
    predicts: bool = True


ERROR_MODELS = {
    "exact": ErrorModel("exact", 0.0, 0.0, 1.0),
    "none": ErrorModel("none", 0.0, 0.0, 1.0, predicts=False),
    # Shrinks as continuous re-prediction does. Milder than the paper at the start (docs/simulator.md).
    "continuous": ErrorModel("continuous", 0.9, 0.12, 3500.0),
    "noise-30": ErrorModel("noise-30", 0.3, 0.3, 1.0),
    "noise-60": ErrorModel("noise-60", 0.6, 0.6, 1.0),
    "noise-100": ErrorModel("noise-100", 1.0, 1.0, 1.0),
}


def error_model(name_or_file: str) -> ErrorModel:
    """Return a named error model, or read one from JSON {"start", "end", "tokens"}; ValueError names what is wrong."""
    if name_or_file in ERROR_MODELS:
        return ERROR_MODELS[name_or_file]
    path = Path(name_or_file)
    try:
        fields = json.loads(read_text(path))
        model = ErrorModel(path.stem, float(fields["start"]), float(fields["end"]), float(fields["tokens"]))
    except TextFileError as error:
        known = ", ".join(ERROR_MODELS)
        raise ValueError(f"{name_or_file}: no such error model or file ({error}); known: {known}") from None
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{name_or_file}: an error model needs the numbers start, end and tokens: {error!r}") from None
    if not (
        min(model.start, model.end) >= 0 and model.tokens > 0 and math.isfinite(model.start + model.end + model.tokens)
    ):
        raise ValueError(f"{name_or_file}: start and end must not be negative, tokens must be positive, all finite")
    return model
