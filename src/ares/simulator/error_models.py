"""Models of prediction error for the simulated predictor."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ares.text_files import TextFileError, read_text


@dataclass(frozen=True, slots=True)
class ErrorModel:
    """Log-normal error of the predicted remaining length that changes as a request goes on; or no predictor.

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
        Nothing is predicted, and every request is expected to go on as outputs did that ended lately.
    mean_output
        Mean output length of the evaluation that `tokens` was measured in; None: `tokens` holds for every workload.
    """

    name: str
    start: float
    end: float
    tokens: float
    predicts: bool = True
    residual_life: bool = False
    mean_output: float | None = None

    def tokens_at(self, mean_output: float) -> float:
        """Return `tokens` for a workload: what was measured halfway through an output holds halfway through its own."""
        return self.tokens if self.mean_output is None else self.tokens * mean_output / self.mean_output


ERROR_MODELS = {
    "exact": ErrorModel("exact", 0.0, 0.0, 1.0),
    "none": ErrorModel("none", 0.0, 0.0, 1.0, predicts=False),
    # What the gateway does with a model that has no predictor.
    "residual-life": ErrorModel("residual-life", 0.0, 0.0, 1.0, residual_life=True),
    # Shrinks as continuous re-prediction does. Milder than the paper at the start (docs/simulator.md).
    "continuous": ErrorModel("continuous", 0.9, 0.12, 3500.0),
    "noise-30": ErrorModel("noise-30", 0.3, 0.3, 1.0),
    "noise-60": ErrorModel("noise-60", 0.6, 0.6, 1.0),
    "noise-100": ErrorModel("noise-100", 1.0, 1.0, 1.0),
}


def error_model(name_or_file: str) -> ErrorModel:
    """Return a named error model, or read one from a JSON file; ValueError names what is wrong.

    The file holds {"start", "end", "tokens"}, or is what `ares predictor evaluate --json` writes.
    """
    if name_or_file in ERROR_MODELS:
        return ERROR_MODELS[name_or_file]
    path = Path(name_or_file)
    try:
        fields = json.loads(read_text(path))
    except TextFileError as error:
        known = ", ".join(ERROR_MODELS)
        raise ValueError(f"{name_or_file}: no such error model or file ({error}); known: {known}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name_or_file}: not JSON: {error}") from None
    if isinstance(fields, dict) and "models" in fields:
        return _evaluated(name_or_file, fields)
    try:
        model = ErrorModel(path.stem, float(fields["start"]), float(fields["end"]), float(fields["tokens"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{name_or_file}: needs the numbers start, end and tokens ({error!r}), "
            "or to be what ares predictor evaluate --json writes"
        ) from None
    if not (
        min(model.start, model.end) >= 0 and model.tokens > 0 and math.isfinite(model.start + model.end + model.tokens)
    ):
        raise ValueError(f"{name_or_file}: start and end must not be negative, tokens must be positive, all finite")
    return model


def _evaluated(file: str, fields: dict[str, Any]) -> ErrorModel:
    from pydantic import ValidationError

    from ares.simulator.evaluated_error import fitted  # needs scipy

    try:
        return fitted(Path(file).stem, fields)
    except ValidationError as error:
        first = error.errors()[0]
        setting, why = ".".join(str(part) for part in first["loc"]), first["msg"]
        raise ValueError(f"{file}: {setting}: {why}; ares predictor evaluate --json writes it") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
