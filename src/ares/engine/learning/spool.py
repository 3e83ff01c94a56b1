"""The folder of recorded states that wait for a learner: shards in the order in which they were written.

It is bounded: where no learner takes the shards, the oldest are removed. Their age is counted from when this process
first saw them, so that a clock that jumps removes nothing.
"""

import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ares.predictor import shards
from ares.predictor.errors import PredictorError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"part-(\d{12})-[0-9a-f]{8}\.safetensors")


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much may wait for a learner: bytes on disk, and seconds since a shard was written."""

    largest_bytes: int = 256 << 20
    longest_s: float = 7 * 24 * 3600.0


def is_name(name: str) -> bool:
    """Whether a shard of a spool can have this name; no other file can."""
    return _NAME.fullmatch(name) is not None


def waiting(folder: Path) -> list[tuple[str, int]]:
    """Return name and size of the shards, the oldest first; none where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, _size(entry)) for entry in entries if is_name(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((name, size) for name, size in found if size is not None)


def _size(entry: "os.DirEntry[str]") -> int | None:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # a learner has taken it meanwhile
        return None


class Spool:
    """The writing end of the folder.

    Attributes
    ----------
    removed
        How many shards were removed because nothing took them.
    """

    def __init__(self, folder: Path, bounds: Bounds | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._bounds = bounds or Bounds()
        self._clock = clock
        self._seen: dict[str, float] = {}
        self.removed = 0
        for file in folder.glob(".part-*.unfinished"):  # of a process that was killed
            file.unlink(missing_ok=True)
        self._number = max((int(name.split("-")[1]) for name, _ in waiting(folder)), default=0)

    def write(self, source: shards.Source, outputs: Sequence[shards.Output], *, token_ids: bool) -> None:
        """Write a shard; PredictorError where that fails."""
        self._number += 1
        # A name is never used twice: a learner may still order the removal of an earlier shard of this number.
        name = f"part-{self._number:012d}-{uuid.uuid4().hex[:8]}.safetensors"
        shards.write(self._folder, source, outputs, token_ids=token_ids, name=name)
        self.trim()

    def trim(self) -> None:
        """Remove what is beyond the bounds; PredictorError where that fails."""
        try:
            self._trim(self._clock())
        except OSError as error:
            raise PredictorError(f"{self._folder}: the oldest shards cannot be removed: {error}") from error

    def _trim(self, now: float) -> None:
        found = waiting(self._folder)
        self._seen = {name: self._seen.get(name, now) for name, _ in found}
        total = sum(size for _, size in found)
        for name, size in found:
            if total <= self._bounds.largest_bytes and now - self._seen[name] <= self._bounds.longest_s:
                break
            (self._folder / name).unlink(missing_ok=True)
            total -= size
            self.removed += 1
            if self.removed == 1:
                logger.warning(
                    "no learner takes the recorded states in %s: the oldest are removed, beyond %d MB or %g hours",
                    self._folder,
                    self._bounds.largest_bytes >> 20,
                    self._bounds.longest_s / 3600,
                )
