"""Asking a rebalance policy in a thread of its own, so that one that takes too long holds no stream up (I7)."""

import asyncio
import contextlib
import logging
import threading
from collections import Counter

from ares.policy import Cluster, DecisionError, Move, Rebalance, decide_moves

logger = logging.getLogger(__name__)


class Decider:
    """Asks one policy; it is asked nothing new while it has not answered."""

    def __init__(self, policy: Rebalance) -> None:
        self.policy = policy
        self.faults: Counter[str] = Counter()
        self._thread: threading.Thread | None = None

    async def decide(self, cluster: Cluster, most_s: float) -> list[Move]:
        """Return the moves of one period.

        Raises
        ------
        DecisionError
            The policy failed, ordered what cannot be, or took longer than `most_s` seconds; then its late answer is
            dropped.
        """
        if self._thread is not None and self._thread.is_alive():
            raise self._late("has not answered yet")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Move]] = loop.create_future()

        def settle(moves: list[Move] | None, error: Exception | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(moves or [])

        def work() -> None:
            moves, failed = None, None
            try:
                moves = decide_moves(self.policy, cluster)
            except Exception as error:
                failed = error
            with contextlib.suppress(RuntimeError):  # the gateway has stopped
                loop.call_soon_threadsafe(settle, moves, failed)

        self._thread = threading.Thread(target=work, name="rebalance policy", daemon=True)
        self._thread.start()
        try:
            async with asyncio.timeout(most_s):
                return await answer
        except TimeoutError:
            raise self._late(f"took longer than {most_s:g} s") from None

    def _late(self, said: str) -> DecisionError:
        return DecisionError(self.policy.name, "late", f"{said}: it must decide within a period")

    def note(self, error: DecisionError) -> None:
        """Count a fault, and say it in the log the first time that its kind is met."""
        self.faults[error.kind] += 1
        if self.faults[error.kind] == 1:
            logger.error("%s; serving goes on without its moves, and this kind is not said again", error,
                         exc_info=error.__cause__)  # fmt: skip
