"""Waiting for an answer of an instance, but not for an instance that has frozen."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from ares.gateway.pool.generate import EngineLostError
from ares.gateway.pool.instance import Instance

T = TypeVar("T")

# An instance that has sent a token, or was asked, within this long may be alive, whatever its telemetry says.
_ALIVE_S = 5.0


class PendingCall:
    """The answer that a session waits for; one at a time."""

    def __init__(self) -> None:
        self._instance: Instance | None = None
        self._since = 0.0
        self._answer: asyncio.Future[Any] | None = None

    async def answer(self, instance: Instance, work: Coroutine[Any, Any, T]) -> T:
        """Wait for an answer of an instance.

        Raises
        ------
        EngineLostError
            The wait was given up.
        """
        task = asyncio.ensure_future(work)
        self._instance, self._answer, self._since = instance, task, time.monotonic()
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise EngineLostError("the instance has fallen silent") from None
        finally:
            self._instance = self._answer = None

    def give_up_if_frozen(self) -> None:
        """Stop waiting for an instance that has frozen."""
        if self._instance is not None and is_unresponsive(self._instance, self._since):
            self.give_up(self._instance)

    @property
    def instance(self) -> Instance | None:
        """The instance that is to answer."""
        return self._instance

    def give_up(self, instance: Instance) -> None:
        """Stop waiting for this instance."""
        if self._instance is instance and self._answer is not None:
            self._answer.cancel()


def is_unresponsive(instance: Instance, since: float) -> bool:
    """Whether to give an instance up of which nothing has been seen since then, on the clock of `time.monotonic`.

    That its telemetry has stopped is not enough: it may serve all the same (I7).
    """
    return instance.health.frozen and time.monotonic() - since > _ALIVE_S
