"""Checkpoints that instances may have been started with: those that ship, and those that the operator names.

Only their metadata is read, without torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ares import predictor
from ares.learner.versions import hash_of
from ares.predictor.errors import PredictorError

_FOLDER = Path(predictor.__file__).parent / "checkpoints"


@dataclass(frozen=True, slots=True)
class Shipped:
    """A checkpoint's file, and the model that it was trained for."""

    path: Path
    model: str
    hidden_size: int


def ships_for(model: str) -> bool:
    """Whether a checkpoint ships for a model."""
    return any(found.model == model for found in map(_read, sorted(_FOLDER.glob("*.safetensors"))))


def by_version(others: Iterable[Path] = ()) -> dict[str, Shipped]:
    """Return the checkpoints that ship, and others, by their versions.

    Raises
    ------
    PredictorError
        One of them is no checkpoint.
    """
    return {hash_of(path): _read(path) for path in [*sorted(_FOLDER.glob("*.safetensors")), *others]}


def _read(path: Path) -> Shipped:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as opened:
            described = dict(opened.metadata() or {})
        return Shipped(path, described["model"], int(described["hidden_size"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise PredictorError(f"{path}: not a checkpoint: {error}") from error
