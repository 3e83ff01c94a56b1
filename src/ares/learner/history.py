"""Events: what was trained, promoted, demoted and refused, with the numbers behind it; one JSON object a line."""

import contextlib
import json
import logging
import math
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ares.learner.files import write_whole
from ares.protocol import learner_report

logger = logging.getLogger(__name__)

Event = Literal["trained", "promoted", "demoted", "rejected", "rolled_back", "frozen", "unfrozen", "refused", "error"]
KEPT = 1000
# The file is rewritten only now and then.
_MOST = 2 * KEPT
_LONGEST_TEXT = 1000


class History:
    """The newest events of a folder.

    Attributes
    ----------
    events
        The newest `KEPT`, the newest last.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.events = read(path)
        self._unwritten: list[dict[str, Any]] = []
        self._lines = len(_lines(path))

    def add(self, event: Event, text: str, version: str = "", **numbers: float) -> dict[str, Any]:
        """Add an event: one sentence, and its numbers, None where they are not finite. `flush` writes it."""
        finite = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        entry = {"time": time.time(), "event": event, "version": version, "text": text[:_LONGEST_TEXT], **finite}
        self.events = [*self.events[-(KEPT - 1) :], entry]
        self._unwritten = [*self._unwritten[-(KEPT - 1) :], entry]
        return entry

    def flush(self) -> None:
        """Write new events; OSError where that is not possible, and they are written by the next call."""
        if not self._unwritten:
            return
        if self._lines + len(self._unwritten) > _MOST:
            write_whole(self._path, b"".join(map(_line, self.events)))
            self._lines = len(self.events)
        else:
            self._append(b"".join(map(_line, self._unwritten)))
            self._lines += len(self._unwritten)
        self._unwritten = []

    def _append(self, data: bytes) -> None:
        with self._path.open("a+b", buffering=0) as file:
            end = file.seek(0, 2)
            if end:
                file.seek(-1, 2)
                # A process that was killed may have left half a line.
                data = data if file.read(1) == b"\n" else b"\n" + data
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                # On a full disk a part may have been written: all of it is written again later.
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise


def read(path: Path) -> list[dict[str, Any]]:
    """Return the newest events of a file; there may be none. What is no event that a gateway takes is left out."""
    lines = _lines(path)
    events, left_out = [], 0
    for line in lines[-2 * _MOST :]:
        try:
            entry = json.loads(line)
            learner_report.Event.model_validate(entry)
        except (ValidationError, ValueError, RecursionError):
            left_out += 1
        else:
            events.append(entry)
    if left_out:
        logger.warning("%s: %d lines are no whole events: left out", path, left_out)
    return events[-KEPT:]


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError:
        return []


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
