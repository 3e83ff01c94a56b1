"""Calling policies: a slow one runs in a thread of its own, so that no stream waits for it (I7)."""

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
    """Calls one policy; it is not called again while it has not answered.

    Parameters
    ----------
    policy
        The policy.
    ask
        Calls it; DecisionError where it failed or its answer is not valid.
    """

    def __init__(self, policy: P, ask: Callable[..., Answer]) -> None:
        self.policy = policy
        self.faults: Counter[str] = Counter()
        self._ask = ask
        self._thread: threading.Thread | None = None
        self._answered = threading.Event()  # the thread itself ends a little later
        self._answered.set()

    async def decide(self, *arguments: Any, timeout_s: float) -> Answer:
        """Return what the policy decides.

        Raises
        ------
        DecisionError
            The policy failed, its answer is not valid, or it took longer than `timeout_s` seconds; a late answer is
            dropped.
        """
        if self.policy.quick:
            return self._ask(self.policy, *arguments)
        if not self._answered.is_set():
            raise self._late("has not answered yet", timeout_s)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()

        def deliver(decided: Any, error: Exception | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(decided)

        def work() -> None:
            decided, failed = None, None
            try:
                decided = self._ask(self.policy, *arguments)
            except Exception as error:
                failed = error
            self._answered.set()
            with contextlib.suppress(RuntimeError):  # the gateway has stopped
                loop.call_soon_threadsafe(deliver, decided, failed)

        self._answered.clear()
        self._thread = threading.Thread(target=work, name=f"{self.policy.part} policy", daemon=True)
        self._thread.start()
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise self._late(f"took longer than {timeout_s:g} s", timeout_s) from None

    def _late(self, message: str, timeout_s: float) -> DecisionError:
        message = f"{message}: it must decide within {timeout_s:g} s"
        return DecisionError(self.policy.name, "late", message, self.policy.part)

    def record_fault(self, error: DecisionError) -> None:
        """Count a fault, and log the first one of each kind."""
        self.faults[error.kind] += 1
        if self.faults[error.kind] == 1:
            logger.error("%s; serving continues without its decisions, and this kind is not logged again", error,
                         exc_info=error.__cause__)  # fmt: skip
