"""Answers `CheckpointPart`: collects a new checkpoint in the learning folder, then orders the worker to take it.

Parts come in order, from the learner to which the instance belongs (`owner.py`). Whatever is wrong with them, the
checkpoint that predicts stays.
"""

import hashlib
import logging

from ares.engine.learning.folder import LearningFolder
from ares.protocol import messages

logger = logging.getLogger(__name__)


class CheckpointReceiver:
    """The checkpoint that is being received; runs on the thread of the control channel."""

    def __init__(self, folder: LearningFolder) -> None:
        self._folder = folder
        self._version = ""
        self._size = 0
        self._received = 0
        self._digest = hashlib.sha256()

    def receive(self, part: messages.CheckpointPart) -> messages.CheckpointReceived:
        """Store a part."""
        try:
            reason = self._add(part)
        except OSError as error:
            reason = f"it cannot be stored: {error}"
        if reason:
            self._forget()
            logger.warning("refused a checkpoint of learner %s: %s", part.learner, reason)
        return messages.CheckpointReceived(part.call, self._received, reason)

    def _forget(self) -> None:
        self._version, self._size, self._received = "", 0, 0

    def _add(self, part: messages.CheckpointPart) -> str:
        """Add a part; return why it is refused, empty where it is not."""
        if not part.version:
            self._forget()
            if part.size or part.data or part.offset:
                return "a checkpoint without a version"
            self._folder.order("")
            return ""
        end = part.offset + len(part.data)
        if not part.size or end > part.size:
            return f"bytes {part.offset} to {end} of a checkpoint of {part.size} bytes"
        if part.offset == 0:
            self._version, self._size, self._received = part.version, part.size, 0
            self._digest = hashlib.sha256()
        elif (part.version, part.size) != (self._version, self._size) or part.offset > self._received:
            return f"bytes from {part.offset} on without those before them: send it from the beginning"
        elif end <= self._received:
            return ""  # sent again, because the answer was lost
        elif part.offset < self._received:
            return f"bytes from {part.offset} on, of which some are here already: send it from the beginning"
        with self._folder.unfinished.open("ab" if part.offset else "wb") as file:
            file.write(part.data)
        self._digest.update(part.data)
        self._received = end
        return self._complete() if end == part.size else ""

    def _complete(self) -> str:
        if (found := self._digest.hexdigest()) != self._version:
            self._folder.unfinished.unlink(missing_ok=True)
            return f"its SHA-256 is {found}, not that of version {self._version}"
        self._folder.remove_incoming()
        self._folder.unfinished.replace(self._folder.incoming(self._version))
        self._folder.order(self._version)
        return ""
