"""The learning folder of an instance: which files are in it, and who writes them.

======================================  =================  =============================================================
file                                    written by         meaning
======================================  =================  =============================================================
``recorded/part-*.safetensors``         worker             recorded states that no learner has taken (`spool.py`)
``incoming.unfinished``                 control channel    a checkpoint of which not all parts are here
``incoming-VERSION.safetensors``        control channel    a whole checkpoint, until the worker accepts or refuses it
``wanted.json``                         control channel    which checkpoint the worker is to predict with (`Wanted`)
``predictor.safetensors``               worker             the newest accepted checkpoint: a restart begins with it
``owner.json``                          control channel    the learner to which the instance belongs (`owner.py`)
``without-predictor``                   worker             there where a learner has ended predictions, for restarts
``predicting.json``                     worker             what predicts, and what was refused (`Predicting`)
``lock``                                launcher           held while the instance runs
======================================  =================  =============================================================
"""

import contextlib
import hashlib
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from ares.models.cache import cache_folder

T = TypeVar("T")


class Wanted(msgspec.Struct, frozen=True):
    """An order to the worker: predict with the checkpoint `version`, or with none where that is empty.

    `order` differs from order to order, so that a version can be sent again.
    """

    version: str
    order: str = msgspec.field(default_factory=lambda: uuid.uuid4().hex)


class Predicting(msgspec.Struct, frozen=True):
    """What the worker reports: the version that predicts, and the newest one that it refused, with the reason."""

    version: str = ""
    refused: tuple[str, str] = ("", "")


class _Owner(msgspec.Struct, frozen=True):
    """The learner to which the instance belongs."""

    learner: str = ""


@dataclass(frozen=True, slots=True)
class LearningFolder:
    """The paths within a learning folder, and its small files of state."""

    path: Path

    @property
    def recorded(self) -> Path:
        """Folder of the recorded states."""
        return self.path / "recorded"

    @property
    def unfinished(self) -> Path:
        """File of a checkpoint that is being received."""
        return self.path / "incoming.unfinished"

    @property
    def accepted(self) -> Path:
        """File of the newest accepted checkpoint."""
        return self.path / "predictor.safetensors"

    @property
    def ended(self) -> Path:
        """File that is there where a learner has ended the predictions."""
        return self.path / "without-predictor"

    @property
    def lock(self) -> Path:
        """File that is locked while an instance uses the folder."""
        return self.path / "lock"

    def incoming(self, version: str) -> Path:
        """File of a whole checkpoint that is neither accepted nor refused yet."""
        return self.path / f"incoming-{version}.safetensors"

    def prepare(self) -> None:
        """Make the folder, and remove what an earlier process left unfinished; OSError where that fails."""
        self.recorded.mkdir(parents=True, exist_ok=True)
        self.remove_incoming()
        for file in (self.unfinished, self._wanted, self._predicting):
            file.unlink(missing_ok=True)

    def remove_incoming(self) -> None:
        """Remove checkpoints that are neither accepted nor refused."""
        for file in self.path.glob("incoming-*.safetensors"):
            file.unlink(missing_ok=True)

    @property
    def _wanted(self) -> Path:
        return self.path / "wanted.json"

    @property
    def _predicting(self) -> Path:
        return self.path / "predicting.json"

    def wanted(self) -> Wanted | None:
        """Return the newest order; None where there is none."""
        return _read(self._wanted, Wanted)

    def order(self, version: str) -> None:
        """Order the worker to predict with a version; OSError where that cannot be written."""
        _write(self._wanted, Wanted(version))

    def owner(self) -> str:
        """Return the name of the learner to which the instance belongs; empty where that is not known."""
        found = _read(self.path / "owner.json", _Owner)
        return found.learner if found is not None else ""

    def own(self, learner: str) -> None:
        """Keep the name of the learner to which the instance belongs; OSError where it cannot be written."""
        _write(self.path / "owner.json", _Owner(learner))

    def predicting(self) -> Predicting | None:
        """Return the worker's newest report; None where there is none."""
        return _read(self._predicting, Predicting)

    def report(self, predicting: Predicting) -> None:
        """Report what predicts; OSError where that cannot be written."""
        _write(self._predicting, predicting)


def default_folder(model: str, instance: str) -> Path:
    """Return the learning folder of an instance in the user's cache."""
    return cache_folder() / "learning" / _file_name(model) / _file_name(instance)


def _file_name(name: str) -> str:
    """Return a name as a file name, another one for every other name."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[-80:]
    return readable if readable == name else f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def version_of(file: Path) -> str:
    """Return the version of a checkpoint: the SHA-256 of its file in hexadecimal; OSError where it is not there."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read(file: Path, kind: type[T]) -> T | None:
    # Files are renamed into place whole; an instance must survive one that is damaged all the same.
    with contextlib.suppress(OSError, msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.json.decode(file.read_bytes(), type=kind)
    return None


def _write(file: Path, value: msgspec.Struct) -> None:
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_bytes(msgspec.json.encode(value))
    unfinished.replace(file)
