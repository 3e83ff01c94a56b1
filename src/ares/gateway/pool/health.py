"""The state of an instance as the gateway sees it: a table of states, and one line in the log for each change."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

logger = logging.getLogger("ares.gateway.pool.instance")

# An instance that goes up and down all the time gets this many lines, and then one in so many seconds.
_LINES = 10
_SECONDS_A_LINE = 60.0


@dataclass(frozen=True, slots=True)
class _Meaning:
    """What a state means.

    Attributes
    ----------
    says
        How its line in the log begins.
    returns
        Whether the instance may become ready without a change by the operator.
    level
        Of its line in the log; 0: it has none.
    """

    says: str
    returns: bool = True
    level: int = logging.WARNING


class State(Enum):
    """Where an instance stands. Only one that is `READY` gets new work."""

    UNKNOWN = _Meaning("has not been heard yet", level=0)
    UNREACHABLE = _Meaning("cannot be reached")
    NOT_AN_INSTANCE = _Meaning("is not an ARES instance", returns=False)
    KEY_REFUSED = _Meaning("refuses this gateway's key", returns=False)
    OTHER_MODEL = _Meaning("is not used: it serves another model", returns=False)
    DUPLICATE = _Meaning("is not used: it was given twice", returns=False)
    NO_TELEMETRY = _Meaning("says nothing on its control channel")
    READY = _Meaning("is ready", level=logging.INFO)
    DRAINING = _Meaning("drains and takes nothing new", level=logging.INFO)
    LOST = _Meaning("is lost")


class Health:
    """The newest state of one instance.

    Attributes
    ----------
    state
        The newest state.
    why
        What it is and what to do about it, for logs and the status; empty while it is ready.
    served
        Whether it has ever been ready.
    on_change
        Called when the state has changed.
    """

    def __init__(self) -> None:
        self.state = State.UNKNOWN
        self.why = State.UNKNOWN.value.says
        self.served = False
        self.on_change: Callable[[], None] = lambda: None
        self._who = ""
        self._line = ""
        self._lines = float(_LINES)
        self._counted_at = time.monotonic()
        self._left_out = 0
        self._later: asyncio.TimerHandle | None = None

    @property
    def may_return(self) -> bool:
        """Whether it has been ready, and may be again without a change by the operator."""
        return self.served and self.state.value.returns

    def turn(self, who: str, state: State, cause: str = "") -> None:
        """Take note of a state; a change is logged.

        Parameters
        ----------
        who
            How the log calls the instance.
        state
            The state.
        cause
            What it came from, and what to do.
        """
        line = f"{state.value.says}: {cause}" if cause else state.value.says
        changed = state is not self.state
        self.state, self.why = state, "" if state is State.READY else line
        if not changed:
            return
        again = state is State.READY and self.served
        self.served = self.served or state is State.READY
        self.on_change()
        if not state.value.level:
            return
        self._who, self._line = who, f"{line} again" if again else line
        if self._later is not None:
            self._left_out += 1
        else:
            self._log()

    def close(self) -> None:
        """Log nothing more."""
        if self._later is not None:
            self._later.cancel()
            self._later = None

    def _log(self) -> None:
        """Write the newest line now, or where there were too many of late, later."""
        now = time.monotonic()
        self._lines = min(self._lines + (now - self._counted_at) / _SECONDS_A_LINE, float(_LINES))
        self._counted_at = now
        if self._lines < 1.0:
            self._left_out += 1
            delay_s = (1.0 - self._lines) * _SECONDS_A_LINE
            self._later = asyncio.get_running_loop().call_later(delay_s, self._log_later)
            return
        self._lines -= 1.0
        more = f" ({self._left_out} changes were not logged)" if self._left_out else ""
        self._left_out = 0
        logger.log(self.state.value.level or logging.INFO, "%s %s%s", self._who, self._line, more)

    def _log_later(self) -> None:
        self._later = None
        self._left_out -= 1  # the newest is logged now
        self._lines = max(self._lines, 1.0)
        self._counted_at = time.monotonic()
        self._log()
