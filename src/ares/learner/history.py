"""Events: what was trained, promoted, demoted and refused, with the numbers behind it; one JSON object a line."""

import json
import time
from pathlib import Path
from typing import Any, Literal

from ares.learner.files import write_whole

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
        self._lines = len(self.events)

    def add(self, event: Event, text: str, version: str = "", **numbers: float) -> dict[str, Any]:
        """Add an event: one sentence, and its numbers. `flush` writes it."""
        entry = {"time": time.time(), "event": event, "version": version, "text": text[:_LONGEST_TEXT], **numbers}
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
            with self._path.open("a+b") as file:
                if file.tell():
                    file.seek(-1, 2)
                    # A process that was killed, or a full disk, may have left half a line.
                    file.write(b"" if file.read(1) == b"\n" else b"\n")
                file.write(b"".join(map(_line, self._unwritten)))
            self._lines += len(self._unwritten)
        self._unwritten = []


def read(path: Path) -> list[dict[str, Any]]:
    """Return the newest events of a file; lines that are not whole are left out, and there may be no file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    events = []
    for line in lines[-2 * _MOST :]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and {"time", "event", "text"} <= entry.keys():
            events.append(entry)
    return events[-KEPT:]


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
