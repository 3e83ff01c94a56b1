"""Checkpoints that the learner has made, or found at an instance, each under its SHA-256, with how it was made."""

import contextlib
import hashlib
import logging
import shutil
import time
from enum import StrEnum
from pathlib import Path

import msgspec

from ares.learner.files import sync, write_whole
from ares.predictor.errors import PredictorError
from ares.protocol.messages import LARGEST_CHECKPOINT_BYTES

logger = logging.getLogger(__name__)


class DamagedError(OSError):
    """A checkpoint's file is not what was stored."""


class Status(StrEnum):
    """What became of a version."""

    CHALLENGER = "challenger"
    CHAMPION = "champion"
    REJECTED = "rejected"
    DEMOTED = "demoted"


class Version(msgspec.Struct, kw_only=True):
    """How a version was made.

    Attributes
    ----------
    through
        The largest arrival number that it was trained on: outputs that began later are new to it.
    outputs, pairs
        How many complete outputs and recorded states it was trained on; 0 for one that this learner has not trained.
    order
        Rises with every change of any version's status: the newest champion has the largest.
    trained
        Unix time, only shown.
    """

    version: str
    model: str
    hidden_size: int
    through: int = 0
    outputs: int = 0
    pairs: int = 0
    seed: int = 0
    status: Status = Status.CHALLENGER
    order: int = 0
    trained: float = msgspec.field(default_factory=time.time)


class Versions:
    """The checkpoints in a folder."""

    def __init__(self, folder: Path, kept: int) -> None:
        self._folder = folder
        self._kept = kept
        self._known = {found.version: found for found in map(self._read, folder.glob("*.json")) if found is not None}

    def __contains__(self, version: str) -> bool:
        return version in self._known

    def __getitem__(self, version: str) -> Version:
        return self._known[version]

    @property
    def all(self) -> list[Version]:
        """All of them, in order of their last change of status."""
        return sorted(self._known.values(), key=lambda version: version.order)

    @property
    def names(self) -> set[str]:
        """The versions."""
        return set(self._known)

    @property
    def unfinished(self) -> Path:
        """Where a training writes its checkpoint, until it has a version."""
        return self._folder / ".trained.unfinished"

    def path(self, version: str) -> Path:
        """Return the file of a checkpoint."""
        return self._folder / f"{version}.safetensors"

    def find(self, given: str) -> list[str]:
        """Return the versions that begin with what a user gave."""
        return [version for version in self._known if version.startswith(given)]

    def add(self, checkpoint: Path, version: Version) -> None:
        """Take a checkpoint's file, whose hash is the version's name, by moving or copying it into the folder.

        Raises
        ------
        OSError
            It cannot be written.
        """
        target = self.path(version.version)
        unfinished = checkpoint
        if checkpoint.parent != self._folder:
            unfinished = target.with_name(f".{target.name}.unfinished")
            shutil.copyfile(checkpoint, unfinished)
        sync(unfinished)
        unfinished.replace(target)
        sync(self._folder)
        self._store(version)

    def mark(self, version: str, status: Status) -> None:
        """Store what became of a version; one that is not there any more is left out. OSError as for `add`."""
        if version in self._known:
            self._store(msgspec.structs.replace(self._known[version], status=status))

    def prune(self, needed: set[str]) -> None:
        """Delete the oldest ones, but none that is needed."""
        spare = [version.version for version in self.all if version.version not in needed]
        for version in spare[: max(0, len(spare) - self._kept)]:
            del self._known[version]
            for path in (self.path(version), self.path(version).with_suffix(".json")):
                with contextlib.suppress(OSError):
                    path.unlink()

    def data(self, version: str) -> bytes:
        """Return a checkpoint's file.

        Raises
        ------
        DamagedError
            It is gone, or not what was stored.
        OSError
            It cannot be read now.
        """
        try:
            data = self.path(version).read_bytes()
        except FileNotFoundError as error:
            raise DamagedError(f"{self.path(version)} is gone") from error
        if hashlib.sha256(data).hexdigest() != version:
            raise DamagedError(f"{self.path(version)} has changed on the disk")
        return data

    def whole(self, version: str) -> bool:
        """Whether a checkpoint's file is what was stored; also where it cannot be read now, which may pass."""
        try:
            self.data(version)
        except DamagedError:
            return False
        except OSError as error:
            logger.warning("%s: cannot be read: %s", self.path(version), error)
        return True

    def give_up(self, version: str) -> None:
        """Know a damaged version no longer; its files stay, for whoever wants to look."""
        self._known.pop(version, None)

    def _store(self, version: Version) -> None:
        order = 1 + max((known.order for known in self._known.values()), default=0)
        stored = msgspec.structs.replace(version, order=order)
        write_whole(self.path(version.version).with_suffix(".json"), msgspec.json.encode(stored))
        self._known[version.version] = stored

    def _read(self, file: Path) -> Version | None:
        """Return what a file describes; None where it is damaged, or its checkpoint is gone."""
        try:
            found = msgspec.json.decode(file.read_bytes(), type=Version)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if found.version != file.stem or not self.whole(found.version):
            logger.warning("%s: its checkpoint is gone or damaged: left out", file)
            return None
        return found


def hash_of(path: Path) -> str:
    """Return the version of a checkpoint's file.

    Raises
    ------
    PredictorError
        It cannot be read, or is larger than an instance takes.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PredictorError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > LARGEST_CHECKPOINT_BYTES:
        raise PredictorError(f"{path}: {len(data):,} bytes, and an instance takes {LARGEST_CHECKPOINT_BYTES:,} at most")
    return hashlib.sha256(data).hexdigest()
