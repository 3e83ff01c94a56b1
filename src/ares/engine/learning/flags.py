"""The settings of an instance that learns: which of them exclude each other, and its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ares.engine import given_flags
from ares.engine.learning.folder import LearningFolder, default_folder
from ares.engine.prediction import predictor_choice

# What `--predictor` is for an instance that learns and begins without the checkpoint that ships for its model.
LEARN = "learn"
DEFAULT_AT_ONCE = 16


class LearningError(RuntimeError):
    """The instance cannot learn as it was asked to; the message says what to do."""


@dataclass(frozen=True, slots=True)
class LearningFlags:
    """The options of `ares worker` about learning, as they were given.

    Attributes
    ----------
    learn
        ``--learn`` or ``--no-learn``; None: neither.
    folder
        Where to record and to take checkpoints; None takes one in the user's cache.
    record_at_once
        How many outputs are recorded at the same time; None: `DEFAULT_AT_ONCE`.
    record_token_ids
        Whether their token ids are recorded.
    """

    learn: bool | None = None
    folder: Path | None = None
    record_at_once: int | None = None
    record_token_ids: bool = False

    def learns(self, predictor: str | None) -> bool:
        """Whether the instance is to learn, with this ``--predictor``."""
        return self.learn is True or predictor == LEARN

    def check(self, predictor: str | None, *, records_by_hand: bool, connector: str, flags: Sequence[str]) -> None:
        """Raise LearningError for what has no effect, or contradicts what else was given.

        Parameters
        ----------
        predictor
            ``--predictor``; None where it was not given.
        records_by_hand
            Whether ``--record-hidden-states`` was given.
        connector
            The connector's name.
        flags
            Those of vLLM.
        """
        if not self.learns(predictor):
            given = {
                "--learn-folder": self.folder is not None,
                "--record-at-once": self.record_at_once is not None,
                "--record-token-ids": self.record_token_ids,
            }
            if without_effect := [flag for flag, is_given in given.items() if is_given]:
                hint = " (--record-hidden-states always records them)" if records_by_hand else ""
                raise LearningError(f"{', '.join(without_effect)} changes nothing without --learn{hint}")
            return
        if self.learn is False:
            raise LearningError("--predictor learn and --no-learn contradict each other: leave one out")
        if predictor == predictor_choice.NONE:
            raise LearningError(
                "--predictor none and --learn contradict each other: --predictor learn begins without a predictor"
            )
        if records_by_hand:
            raise LearningError("--learn records by itself: leave --record-hidden-states out")
        if "worker-cls" in given_flags.names(flags):
            raise LearningError("--worker-cls and --learn exclude each other: both replace vLLM's worker")
        if connector != "ares":
            raise LearningError(
                f"--learn needs the connector of ARES: a learner does not reach connector {connector!r}"
            )

    def open_folder(self, model: str, instance: str) -> "OpenFolder":
        """Take the learning folder for this process; LearningError where that is not possible."""
        folder = LearningFolder((self.folder or default_folder(model, instance)).expanduser().resolve())
        lock = FileLock(folder.lock)
        try:
            folder.path.mkdir(0o700, parents=True, exist_ok=True)  # hidden states tell much of what was said
            lock.acquire(timeout=0)
            folder.prepare()
        except Timeout as error:
            raise LearningError(
                f"{folder.path} is the learning folder of an instance that runs: give each its own --learn-folder"
            ) from error
        except OSError as error:
            raise LearningError(f"{folder.path}: cannot be written: {error}; give another --learn-folder") from error
        return OpenFolder(folder, lock)


@dataclass(frozen=True, slots=True)
class OpenFolder:
    """A learning folder that no other instance can use while the lock is held."""

    folder: LearningFolder
    lock: FileLock
