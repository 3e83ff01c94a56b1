"""Replaces the predictor of a running instance, between two steps.

A checkpoint that a learner sends arrives as a file (`engine/learning/folder.py`). A thread of its own looks for it,
checks it, loads it and makes a first prediction with it; then the next step takes it. A checkpoint that is refused
changes nothing. The newest one that was accepted is kept, and a restarted instance begins with it.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ares.engine.learning.folder import LearningFolder, Predicting, Wanted, version_of
from ares.engine.prediction.live_predictor import LivePredictor
from ares.predictor.errors import PredictorError

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0
# Of a refusal, in telemetry.
_LONGEST_REASON = 500


@dataclass(frozen=True, slots=True)
class Replacement:
    """What is to predict from the next step on; None: nothing."""

    live: LivePredictor | None


class PredictorSwap:
    """Loads the checkpoints that arrive in a learning folder.

    Parameters
    ----------
    folder
        The learning folder.
    load
        Makes a predictor of a checkpoint, on the device; PredictorError where it is broken or does not fit.
    version
        The version that predicts at the start; empty for none.
    """

    def __init__(self, folder: LearningFolder, load: Callable[[Path], LivePredictor], version: str) -> None:
        self._folder = folder
        self._load = load
        self._handled = ""
        self._replacement: Replacement | None = None
        # Kept for a while: on a GPU, steps in flight may still use its memory after it has been replaced.
        self._previous: list[Replacement] = []
        self._predicting = Predicting(version)
        self._reported: Predicting | None = None
        self._failing = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to look for checkpoints."""
        threading.Thread(target=self._keep_looking, name="ares-predictor-swap", daemon=True).start()

    def take(self) -> Replacement | None:
        """Return what is to predict from now on, once; None where nothing changes."""
        if self._replacement is None:
            return None
        with self._lock:
            replacement, self._replacement = self._replacement, None
            return replacement

    def fail(self) -> None:
        """Note that the predictor has failed while it predicted, and is off."""
        with self._lock:
            if self._replacement is None:
                refused = (self._predicting.version, "it failed while it predicted: see the log of the instance")
                self._predicting = Predicting("", refused)

    def look(self) -> None:
        """Handle a new order, if there is one, and report what predicts."""
        wanted = self._folder.wanted()
        if wanted is not None and wanted.order != self._handled:
            self._handle(wanted)
        if self._reported != self._predicting:
            predicting = self._predicting
            self._folder.report(predicting)
            self._reported = predicting

    def _keep_looking(self) -> None:
        pause = threading.Event()
        while not pause.wait(_INTERVAL_S):
            try:
                self.look()
                self._failing = False
            except Exception:  # such as a full disk: the next time may be better
                if not self._failing:
                    logger.exception("a new checkpoint of the predictor cannot be handled; it is tried again")
                self._failing = True

    def _handle(self, wanted: Wanted) -> None:
        if not wanted.version:
            # First this one: a restart in between must not begin with the checkpoint that ships.
            self._folder.ended.touch()
            self._folder.accepted.unlink(missing_ok=True)
            self._replace(Replacement(None), Predicting("", self._predicting.refused))
            logger.info("a learner has ended the predictions")
            self._handled = wanted.order
            return
        file = self._folder.incoming(wanted.version)
        try:
            replacement = Replacement(self._made(file, wanted.version))
        except Exception as error:  # whatever is wrong with a file, what predicts stays
            if (newest := self._folder.wanted()) is not None and newest.order != wanted.order:
                return  # another checkpoint has arrived meanwhile, in whose favour this one was removed
            if not isinstance(error, PredictorError):
                logger.exception("a checkpoint of the predictor cannot be loaded")
            self._refuse(wanted.version, str(error) or type(error).__name__, file)
        else:
            file.replace(self._folder.accepted)
            self._folder.ended.unlink(missing_ok=True)
            self._replace(replacement, Predicting(wanted.version))
            logger.info("the predictor is now version %s", wanted.version[:12])
        self._handled = wanted.order

    def _made(self, file: Path, version: str) -> LivePredictor:
        if (found := version_of(file)) != version:
            raise PredictorError(f"its SHA-256 is {found}")
        live = self._load(file)
        live.warm_up()
        return live

    def _refuse(self, version: str, why: str, file: Path) -> None:
        reason = why.removeprefix(f"{file}: ").replace("\n", " ")[:_LONGEST_REASON]
        logger.warning("refused the predictor's version %s, and keep what predicts: %s", version[:12], reason)
        self._predicting = Predicting(self._predicting.version, (version, reason))
        file.unlink(missing_ok=True)

    def _replace(self, replacement: Replacement, predicting: Predicting) -> None:
        with self._lock:
            self._replacement, self._predicting = replacement, predicting
        self._previous = [*self._previous[-1:], replacement]
