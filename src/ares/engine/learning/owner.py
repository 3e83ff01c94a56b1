"""The learner to which an instance belongs: one at a time, so that two neither share its data nor take turns.

It is the first one that asks for recorded states or sends a checkpoint, for as long as it does so; when nothing has
come of it for a while, the next one that asks takes its place. A file keeps its name, so that an instance that restarts
waits for it first.
"""

import logging
import math
from collections.abc import Callable

from ares.engine.learning.folder import LearningFolder

logger = logging.getLogger(__name__)

LEASE_S = 60.0


class Owner:
    """The lease of a learner on an instance.

    Parameters
    ----------
    folder
        The learning folder.
    clock
        Seconds, monotonic.
    """

    def __init__(self, folder: LearningFolder, clock: Callable[[], float]) -> None:
        self._folder = folder
        self._clock = clock
        self._learner = folder.owner()
        self._until = clock() + LEASE_S if self._learner else -math.inf

    def refusal(self, learner: str) -> str:
        """Take note that a learner asks; return why it is refused, empty where the instance belongs to it."""
        now = self._clock()
        if learner != self._learner:
            if now < self._until:
                return (
                    f"it belongs to learner {self._learner}: stop one of the two, or give each its own instances "
                    f"(it is free {LEASE_S:.0f} s after that learner's last question)"
                )
            if self._learner:
                logger.warning("belongs to learner %s now, since learner %s is silent", learner, self._learner)
            self._learner = learner
            try:
                self._folder.own(learner)
            except OSError as error:
                logger.warning("%s: after a restart any learner may take this instance: %s", self._folder.path, error)
        self._until = now + LEASE_S
        return ""
