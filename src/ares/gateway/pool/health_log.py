"""One line in the log for each change of an instance's status, and fewer for one that changes all the time."""

import asyncio
import logging
import time

from ares.gateway.tuning import DEFAULT, Tuning

logger = logging.getLogger("ares.gateway.pool.instance")


class HealthLog:
    """The log lines of one instance: a token bucket, which writes the newest line when it may again."""

    def __init__(self, tuning: Tuning = DEFAULT) -> None:
        self._most_lines, self._line_s = float(tuning.health_log_lines), tuning.health_log_line_s
        self._level = logging.INFO
        self._line = ""
        self._fields: dict[str, str] = {}
        self._allowance = self._most_lines
        self._refilled_at = time.monotonic()
        self._omitted = 0
        self._later: asyncio.TimerHandle | None = None

    def write(self, level: int, line: str, fields: dict[str, str]) -> None:
        """Log a line now, or later where there were too many lately; a newer one replaces one that waits.

        `fields` are those of its JSON form, where the log has that.
        """
        self._level, self._line, self._fields = level, line, fields
        if self._later is not None:
            self._omitted += 1
        else:
            self._log()

    def close(self) -> None:
        """Log nothing more."""
        if self._later is not None:
            self._later.cancel()
            self._later = None

    def _log(self) -> None:
        now = time.monotonic()
        self._allowance = min(self._allowance + (now - self._refilled_at) / self._line_s, self._most_lines)
        self._refilled_at = now
        if self._allowance < 1.0:
            self._omitted += 1
            delay_s = (1.0 - self._allowance) * self._line_s
            self._later = asyncio.get_running_loop().call_later(delay_s, self._log_later)
            return
        self._allowance -= 1.0
        more = f" ({self._omitted} changes were not logged)" if self._omitted else ""
        self._omitted = 0
        logger.log(self._level, "%s%s", self._line, more, extra=self._fields)

    def _log_later(self) -> None:
        self._later = None
        self._omitted -= 1  # the newest is logged now
        self._allowance = max(self._allowance, 1.0)
        self._refilled_at = time.monotonic()
        self._log()
