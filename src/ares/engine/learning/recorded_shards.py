"""Answers `TakeRecorded`: hands recorded shards to a learner, and deletes those that it has stored."""

import contextlib
import logging
from pathlib import Path

from ares.engine.learning import spool
from ares.protocol import messages, rpc

logger = logging.getLogger(__name__)

# What a message has besides the shard is far below this.
_LARGEST_SHARD_BYTES = rpc.MAX_MESSAGE_BYTES - (64 << 10)


class RecordedShards:
    """The reading end of an instance's spool; runs on the thread of the control channel."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._too_large: set[str] = set()
        # Those that a learner has stored, and that cannot be deleted.
        self._stored: set[str] = set()

    def take(self, command: messages.TakeRecorded) -> messages.Recorded:
        """Return the oldest shard that the learner has not stored, after deleting those that it has."""
        self._delete({name for name in command.stored if spool.is_name(name)})
        found = [(name, size) for name, size in spool.waiting(self._folder) if name not in self._stored]
        sendable = [name for name, size in found if size <= _LARGEST_SHARD_BYTES]
        self._note_too_large({name for name, size in found if size > _LARGEST_SHARD_BYTES})
        for place, name in enumerate(sendable):
            # It may have been removed meanwhile, to keep the spool within its bounds.
            with contextlib.suppress(OSError):
                data = (self._folder / name).read_bytes()
                return messages.Recorded(command.call, name, data, len(sendable) - place - 1)
        return messages.Recorded(command.call)

    def _delete(self, stored: set[str]) -> None:
        """Delete what a learner has stored; what cannot be deleted is tried again with every question."""
        failing, self._stored = bool(self._stored), self._stored | stored
        for name in list(self._stored):
            try:
                (self._folder / name).unlink(missing_ok=True)
            except OSError as error:
                if not failing:
                    logger.warning("what a learner has stored cannot be deleted here, and is kept: %s", error)
                failing = True
            else:
                self._stored.discard(name)

    def _note_too_large(self, names: set[str]) -> None:
        if new := names - self._too_large:
            logger.warning("%s: larger than a message, never sent to a learner: %s", self._folder, ", ".join(new))
        self._too_large = names
