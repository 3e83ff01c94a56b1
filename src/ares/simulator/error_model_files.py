"""Models of prediction error by name, or from a JSON file."""

import json
import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ares.simulator.error_models import ERROR_MODELS, ErrorModel
from ares.simulator.evaluated_error import fitted
from ares.text_files import TextFileError, read_text


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
    try:
        return fitted(Path(file).stem, fields)
    except ValidationError as error:
        first = error.errors()[0]
        setting, why = ".".join(str(part) for part in first["loc"]), first["msg"]
        raise ValueError(f"{file}: {setting}: {why}; ares predictor evaluate --json writes it") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
