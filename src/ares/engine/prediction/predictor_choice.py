"""Which predictor an instance loads: the given one, the one that ships for its model, or none."""

import json
import logging
from pathlib import Path

from ares import predictor
from ares.engine.learning.folder import LearningFolder
from ares.predictor.errors import PredictorError
from ares.predictor.shards import HIDDEN_STATE

logger = logging.getLogger(__name__)

NONE = "none"
_SHIPPED = Path(predictor.__file__).parent / "checkpoints"


def choose(given: str | None, model: str, folder: Path) -> Path | None:
    """Return the checkpoint to run with, or None.

    Parameters
    ----------
    given
        A file, ``none``, or None for the shipped checkpoint where one fits.
    model, folder
        The served model's name and files.

    Raises
    ------
    PredictorError
        A file was given and it does not fit, or cannot be read.
    """
    if given == NONE:
        return None
    # Only now: it imports torch, which a worker does anyway.
    from ares.predictor import checkpoint

    hidden_size = _hidden_size(folder)
    if given is not None:
        loaded = checkpoint.load(Path(given))
        try:
            loaded.check(model, hidden_size, HIDDEN_STATE)
        except PredictorError as error:
            raise PredictorError(f"{given}: {error}; use another --predictor, or none") from error
        return Path(given)
    for path in sorted(_SHIPPED.glob("*.safetensors")):
        try:
            checkpoint.load(path).check(model, hidden_size, HIDDEN_STATE)
        except PredictorError:
            continue
        return path
    logger.warning("no predictor ships for %s: requests get no predictions (ares predictor --help)", model)
    return None


def begin(learning: LearningFolder, given: str | None, model: str, folder: Path, *, ships: bool) -> Path | None:
    """Return the checkpoint that an instance begins with that learns, or None.

    Parameters
    ----------
    learning
        Its learning folder: what a learner has ordered last takes precedence.
    given
        A file that was given to begin with, or None.
    model, folder
        The served model's name and files.
    ships
        Whether it may begin with the checkpoint that ships for the model.

    Raises
    ------
    PredictorError
        A file was given and it does not fit, or cannot be read.
    """
    if learning.ended.exists():
        if given is not None:
            choose(given, model, folder)
        logger.warning("begins without a predictor, as a learner ordered: remove %s to begin with one", learning.ended)
        return None
    found = learned(learning.accepted, model, folder, given)
    return choose(given, model, folder) if found is None and ships else found


def learned(file: Path, model: str, folder: Path, given: str | None = None) -> Path | None:
    """Return the checkpoint that an instance learned before it was restarted; None where there is none that fits.

    Parameters
    ----------
    file
        Where it is kept.
    model, folder
        The served model's name and files.
    given
        A file that was given to begin with; what was learned since takes precedence, with a line that says so.

    Raises
    ------
    PredictorError
        A file was given and it does not fit, or cannot be read.
    """
    if given is not None:
        choose(given, model, folder)
    if not file.exists():
        return None
    from ares.predictor import checkpoint

    try:
        checkpoint.load(file).check(model, _hidden_size(folder), HIDDEN_STATE)
    except PredictorError as error:
        logger.warning("the predictor that was learned here is not used: %s", error)
        return None
    if given is not None:
        logger.warning(
            "begins with what was learned here, %s, not with %s: remove the former to begin anew", file, given
        )
    else:
        logger.info("begins with the predictor that was learned here: %s", file)
    return file


def _hidden_size(folder: Path) -> int:
    try:
        config = json.loads((folder / "config.json").read_text())
        return int(config.get("hidden_size") or config["text_config"]["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
