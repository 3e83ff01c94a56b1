"""Waiting for an instance, but not for one that has frozen."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from ares.gateway.engine import EngineLostError
from ares.gateway.instances import Instance

T = TypeVar("T")

# A stream that has brought a token within this long is alive, whatever its instance's telemetry says.
_ALIVE_S = 5.0


class Patience:
    """What a sequence waits for at an instance: one answer at a time."""

    def __init__(self) -> None:
        self._instance: Instance | None = None
        self._answer: asyncio.Future[Any] | None = None

    async def answer(self, instance: Instance, work: Coroutine[Any, Any, T]) -> T:
        """Wait for an answer of an instance.

        Raises
        ------
        EngineLostError
            The wait was given up.
        """
        task = asyncio.ensure_future(work)
        self._instance, self._answer = instance, task
        try:
            return await task
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if me is not None and me.cancelling():
                raise
            raise EngineLostError("the instance has fallen silent") from None
        finally:
            self._instance = self._answer = None

    def give_up_if_frozen(self) -> None:
        """Stop waiting for an instance that has frozen."""
        if self._instance is not None and self._instance.frozen:
            self.give_up(self._instance)

    def waits_for(self, instance: Instance) -> bool:
        """Whether this instance is to answer."""
        return self._instance is instance

    def give_up(self, instance: Instance) -> None:
        """Stop waiting for this instance."""
        if self._instance is instance and self._answer is not None:
            self._answer.cancel()


def is_dead(instance: Instance, last_token_at: float) -> bool:
    """Whether a stream whose last token came then, on the clock of `time.monotonic`, is to be given up."""
    return instance.frozen and time.monotonic() - last_token_at > _ALIVE_S
