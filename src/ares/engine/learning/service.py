"""What the control channel asks of an instance that learns, and one that does not."""

import time
from collections.abc import Callable

from ares.engine.learning.checkpoint_receiver import CheckpointReceiver
from ares.engine.learning.folder import LearningFolder, Predicting
from ares.engine.learning.owner import Owner
from ares.engine.learning.recorded_shards import RecordedShards
from ares.protocol import messages

LearningCommand = messages.TakeRecorded | messages.CheckpointPart
NOT_LEARNING = "this instance does not learn: start it with `ares worker --learn`"
# Telemetry may be sent a hundred times a second; what predicts changes after minutes.
_REPORT_AGE_S = 0.5


class LearningService:
    """Answers a learner's commands, on the thread of the control channel.

    Parameters
    ----------
    folder
        The learning folder.
    version
        The version that predicts until the worker reports.
    """

    def __init__(self, folder: LearningFolder, version: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._recorded = RecordedShards(folder.recorded)
        self._receiver = CheckpointReceiver(folder)
        self._owner = Owner(folder, clock)
        self._clock = clock
        self._predicting = Predicting(version)
        self._read = -_REPORT_AGE_S

    def answer(self, command: LearningCommand) -> messages.Event:
        """Carry out a command; one of a learner to which the instance does not belong is refused."""
        if reason := self._owner.refusal(command.learner):
            return refusal(command, reason)
        if isinstance(command, messages.TakeRecorded):
            return self._recorded.take(command)
        return self._receiver.receive(command)

    def predicting(self) -> Predicting:
        """Return what predicts here."""
        now = self._clock()
        if now - self._read >= _REPORT_AGE_S:
            self._read = now
            self._predicting = self._folder.predicting() or self._predicting
        return self._predicting


def refusal(command: LearningCommand, reason: str = NOT_LEARNING) -> messages.Event:
    """Answer a command that cannot be carried out: there is no shard, and no checkpoint is taken."""
    if isinstance(command, messages.TakeRecorded):
        return messages.Recorded(command.call, refused=reason)
    return messages.CheckpointReceived(command.call, refused=reason)
