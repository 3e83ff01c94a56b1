"""Waiting for the answer of an instance, for as long as it is not frozen."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from ares.gateway.pool.delta import EngineLostError
from ares.gateway.pool.instance import Instance
from ares.gateway.tuning import DEFAULT

T = TypeVar("T")


class PendingCall:
    """The answer that a session waits for; one at a time.

    Parameters
    ----------
    alive_s
        See `is_unresponsive`.
    """

    def __init__(self, alive_s: float = DEFAULT.alive_s) -> None:
        self._alive_s = alive_s
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
            raise EngineLostError("the instance does not respond") from None
        finally:
            self._instance = self._answer = None

    def give_up_if_frozen(self) -> None:
        """Stop waiting for an instance that has frozen."""
        if self._instance is not None and is_unresponsive(self._instance, self._since, self._alive_s):
            self.give_up(self._instance)

    @property
    def instance(self) -> Instance | None:
        """The instance that is to answer."""
        return self._instance

    def give_up(self, instance: Instance) -> None:
        """Stop waiting for this instance."""
        if self._instance is instance and self._answer is not None:
            self._answer.cancel()


def is_unresponsive(instance: Instance, since: float, alive_s: float) -> bool:
    """Whether to give up an instance that is frozen and has not been seen since then, more than `alive_s` ago.

    `since` is a time of `time.monotonic`. That its telemetry has stopped is not enough: it may serve all the same (I7).
    """
    return instance.health.frozen and time.monotonic() - since > alive_s
