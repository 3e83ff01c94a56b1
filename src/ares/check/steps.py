"""Running checks one after the other, each with a time limit, and all together with another one."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import aiohttp

from ares.check.rows import Outcome, Row
from ares.gateway.pool.delta import EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import NoInstanceError
from ares.gateway.session.handover import HandoverError, NotMovableError

T = TypeVar("T")
# How an instance may fail a check.
_FAILURES = (
    EngineLostError,
    EngineRefusedError,
    NoInstanceError,
    HandoverError,
    NotMovableError,
    aiohttp.ClientError,
    OSError,
)


class Steps:
    """Runs checks.

    Parameters
    ----------
    step_s, total_s
        Time limits of one check and of all.
    note
        Called with what begins.
    """

    def __init__(self, step_s: float, total_s: float, note: Callable[[str], None]) -> None:
        self.rows: list[Row] = []
        self._step_s, self._total_s, self._note = step_s, total_s, note
        self._deadline = asyncio.get_running_loop().time() + total_s

    async def run(self, group: str, check: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        """Run one check; where it fails to end, add a row for it and return None."""
        left_s = self._deadline - asyncio.get_running_loop().time()
        if left_s <= 0:
            advice = "give more with --time-limit"
            self.rows.append(
                Row(group, check, Outcome.NOT_RUN, f"the limit of {self._total_s:g} s was reached", advice)
            )
            return None
        self._note(f"{group}: {check}")
        try:
            async with asyncio.timeout(min(self._step_s, left_s)):
                return await work()
        except TimeoutError:
            limit_s = min(self._step_s, left_s)
            advice = "see the logs of these instances; a slow cluster needs a larger --step-limit"
            self.rows.append(Row(group, check, Outcome.FAIL, f"did not end within {limit_s:.0f} s", advice))
        except _FAILURES as error:
            text = str(error) or type(error).__name__
            self.rows.append(Row(group, check, Outcome.FAIL, text, "see the logs of these instances"))
        return None
