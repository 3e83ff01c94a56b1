"""The learner's folder: where everything is, and the lock that keeps a second learner out.

====================================  ====================================================================
``lock``                              held while a learner, or a command of the operator, works on it
``state.json``                        which version is the champion, which the challenger, and so on
``history.jsonl``                     events, one a line
``recorded/NUMBER-HASH.safetensors``  recorded states as they came from the instances, in order of arrival
``versions/VERSION.safetensors``      checkpoints; ``VERSION.json`` describes how each was made
``commands/NAME.json``                commands of the operator that a running learner has not taken yet
====================================  ====================================================================
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ares.learner.errors import LearnerError
from ares.learner.files import remove_unfinished


class LockedError(LearnerError):
    """Another process holds the lock."""


@dataclass(frozen=True, slots=True)
class Folder:
    """The paths in a learner's folder."""

    path: Path

    @property
    def state(self) -> Path:
        """The file of the state."""
        return self.path / "state.json"

    @property
    def history(self) -> Path:
        """The file of the events."""
        return self.path / "history.jsonl"

    @property
    def recorded(self) -> Path:
        """The folder of recorded states."""
        return self.path / "recorded"

    @property
    def versions(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "versions"

    @property
    def commands(self) -> Path:
        """The folder of the operator's commands."""
        return self.path / "commands"

    def exists(self) -> bool:
        """Whether a learner has worked on it before."""
        return self.state.exists() or self.versions.is_dir()

    def prepare(self) -> None:
        """Make its folders, and delete files that were left half written.

        Raises
        ------
        LearnerError
            It cannot be written.
        """
        try:
            for folder in (self.recorded, self.versions, self.commands):
                folder.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.recorded, self.versions, self.commands):
                remove_unfinished(folder)
                probe = folder / ".probe.unfinished"
                probe.touch()
                probe.unlink()
        except OSError as error:
            raise LearnerError(
                f"{error.filename or self.path}: cannot be written: {error.strerror}; give another --folder, or change "
                "its owner"
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock; the kernel gives it back however this process ends.

        Raises
        ------
        LockedError
            Another process holds it; the message has its host and pid.
        LearnerError
            The lock cannot be made.
        """
        path = self.path / "lock"
        try:
            # Parts of texts can be reconstructed from recorded states: they are for their owner alone.
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise LearnerError(f"{path}: cannot be opened: {error.strerror}; give another --folder") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LockedError(f"{self.path}: {_holder(path)} works on this folder already") from None
            except OSError as error:
                raise LearnerError(f"{path}: cannot be locked: {error.strerror}; use a local file system") from error
            # A full disk must not keep a learner from starting: the content is only for messages.
            with contextlib.suppress(OSError):
                file.truncate(0)
                file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
                file.flush()
            yield

    def holder(self) -> str | None:
        """Return who holds the lock, such as ``the learner with pid 12 on host-a``; None where it is free."""
        if not (self.path / "lock").exists():
            return None
        try:
            with (self.path / "lock").open("a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(self.path / "lock")
        except OSError:
            return None
        return None


def _holder(lock: Path) -> str:
    try:
        known = json.loads(lock.read_text())
        return f"the learner with pid {int(known['pid'])} on {known['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another learner"
