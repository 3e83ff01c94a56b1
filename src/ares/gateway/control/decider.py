"""Asking policies: one that takes too long is asked in a thread of its own, so that it holds no stream up (I7)."""

import asyncio
import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ares.policy import DecisionError, Policy

logger = logging.getLogger(__name__)

P = TypeVar("P", bound=Policy)
Answer = TypeVar("Answer")


class Decider(Generic[P, Answer]):
    """Asks one policy; it is asked nothing new while it has not answered.

    Parameters
    ----------
    policy
        The policy.
    ask
        Asks it; DecisionError where it failed or answered what cannot be.
    """

    def __init__(self, policy: P, ask: Callable[..., Answer]) -> None:
        self.policy = policy
        self.faults: Counter[str] = Counter()
        self._ask = ask
        self._thread: threading.Thread | None = None
        self._answered = threading.Event()  # the thread itself ends a little later
        self._answered.set()

    async def decide(self, *given: Any, most_s: float) -> Answer:
        """Return what the policy decides.

        Raises
        ------
        DecisionError
            The policy failed, decided what cannot be, or took longer than `most_s` seconds; then its late answer is
            dropped.
        """
        if self.policy.quick:
            return self._ask(self.policy, *given)
        if not self._answered.is_set():
            raise self._late("has not answered yet", most_s)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()

        def settle(decided: Any, error: Exception | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(decided)

        def work() -> None:
            decided, failed = None, None
            try:
                decided = self._ask(self.policy, *given)
            except Exception as error:
                failed = error
            self._answered.set()
            with contextlib.suppress(RuntimeError):  # the gateway has stopped
                loop.call_soon_threadsafe(settle, decided, failed)

        self._answered.clear()
        self._thread = threading.Thread(target=work, name=f"{self.policy.part} policy", daemon=True)
        self._thread.start()
        try:
            async with asyncio.timeout(most_s):
                return await answer
        except TimeoutError:
            raise self._late(f"took longer than {most_s:g} s", most_s) from None

    def _late(self, said: str, most_s: float) -> DecisionError:
        said = f"{said}: it must decide within {most_s:g} s"
        return DecisionError(self.policy.name, "late", said, self.policy.part)

    def note(self, error: DecisionError) -> None:
        """Count a fault, and say it in the log the first time that its kind is met."""
        self.faults[error.kind] += 1
        if self.faults[error.kind] == 1:
            logger.error("%s; serving goes on without its decisions, and this kind is not said again", error,
                         exc_info=error.__cause__)  # fmt: skip
