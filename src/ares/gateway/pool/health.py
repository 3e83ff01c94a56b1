"""The health of an instance as the gateway sees it: when it last reported, and its status in a table of states."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from ares.gateway.pool.health_log import HealthLog
from ares.gateway.tuning import DEFAULT, Tuning


@dataclass(frozen=True, slots=True)
class _Meaning:
    """What a status means.

    Attributes
    ----------
    text
        How its line in the log begins.
    returns
        Whether the instance may become ready without a change by the operator.
    level
        Of its line in the log; 0: it has none.
    """

    text: str
    returns: bool = True
    level: int = logging.WARNING


class Status(Enum):
    """What is known of an instance. Only one that is `READY` gets new work."""

    UNKNOWN = _Meaning("has not reported yet", level=0)
    UNREACHABLE = _Meaning("cannot be reached")
    NOT_AN_INSTANCE = _Meaning("is not an ARES instance", returns=False)
    KEY_REFUSED = _Meaning("refuses this gateway's key", returns=False)
    OTHER_MODEL = _Meaning("is not used: it serves another model", returns=False)
    WRONG_ADDRESS = _Meaning("is not used: others cannot connect to the address that it publishes", returns=False)
    DUPLICATE = _Meaning("is not used: it was given twice", returns=False)
    NO_TELEMETRY = _Meaning("sends nothing on its control channel")
    READY = _Meaning("is ready", level=logging.INFO)
    DRAINING = _Meaning("is draining and takes no new requests", level=logging.INFO)
    LEAVING = _Meaning("is leaving and takes no new requests", level=logging.INFO)
    LOST = _Meaning("is lost")


class Health:
    """Whether one instance can be used, and why not.

    Parameters
    ----------
    interval_s
        Seconds between two reports of the instance.
    tuning
        The gateway's times and limits.

    Attributes
    ----------
    status
        The newest status.
    why
        What it is and what to do about it, for logs and the operator; empty while it is ready.
    served
        Whether it has ever been ready.
    suspect
        Whether a connection to it has failed since it last answered over HTTP.
    on_change
        Called when the status has changed.
    """

    def __init__(self, interval_s: float = 0.0, tuning: Tuning = DEFAULT) -> None:
        self.status = Status.UNKNOWN
        self.why = Status.UNKNOWN.value.text
        self.served = False
        self.suspect = False
        self.on_change: Callable[[], None] = lambda: None
        self._log = HealthLog(tuning)
        self._tuning = tuning
        self._longest_silence_s = max(tuning.silent_s, tuning.silent_intervals * interval_s)
        # Whether telemetry has come over the present connection.
        self._reports = False
        # The newest telemetry or greeting, the newest message of any kind, the newest answer over HTTP.
        self._report_at = self._message_at = self._answer_at = 0.0

    # --- what comes from it ---

    def connected(self) -> None:
        """Note a new connection, over which nothing has come yet."""
        self._reports = self.suspect = False
        self._report_at = time.monotonic()

    def disconnected(self) -> None:
        """Note that the connection is given up."""
        self._reports = False

    def received(self) -> None:
        """Note a message."""
        self._message_at = time.monotonic()

    def reported(self, *, load: bool) -> float:
        """Note that the newest message is a report of its load, or its greeting; return when it came."""
        self._report_at = self._message_at
        self._reports = self._reports or load
        return self._message_at

    def answered(self) -> None:
        """Note that it has answered over HTTP."""
        self.suspect = False
        self._answer_at = time.monotonic()

    def connection_failed(self) -> None:
        """Count it as lost until it answers over HTTP and reports again: a connection to it failed.

        An engine whose HTTP server has died may continue to send telemetry.
        """
        self._report_at = 0.0
        self.suspect = True

    def extend_deadline(self, seconds: float) -> None:
        """Do not count so many seconds of silence: the gateway itself was not listening."""
        self._message_at = min(self._message_at + seconds, time.monotonic())

    @property
    def reports(self) -> bool:
        """Whether its telemetry has come over the present connection."""
        return self._reports

    @property
    def healthy(self) -> bool:
        """Whether it has reported lately, and no connection to it has failed since it last answered over HTTP."""
        return self._reports and time.monotonic() - self._report_at < self._longest_silence_s and not self.suspect

    @property
    def reachable(self) -> bool:
        """Whether it answers, even if its telemetry has stopped: serving does not depend on that (I7)."""
        return self.healthy or time.monotonic() - self._answer_at < self._tuning.silent_s

    @property
    def frozen(self) -> bool:
        """Whether nothing has come from it for so long that its requests are better resumed elsewhere."""
        return self._reports and time.monotonic() - self._message_at > self._tuning.frozen_s

    @property
    def never_reported(self) -> bool:
        """Whether the present connection has brought no telemetry for too long."""
        return not self._reports and time.monotonic() - self._report_at > self._tuning.silent_s

    @property
    def only_answers(self) -> bool:
        """Whether it answered over HTTP long after its last message on the control channel."""
        return self._answer_at - self._message_at > self._longest_silence_s

    # --- its status ---

    @property
    def may_return(self) -> bool:
        """Whether it has been ready, and may be again without a change by the operator."""
        return self.served and self.status.value.returns

    def set_status(self, name: str, status: Status, cause: str = "") -> None:
        """Set the status; a change is logged.

        Parameters
        ----------
        name
            What the log calls the instance.
        status
            The new status.
        cause
            Why, and what to do.
        """
        line = f"{status.value.text}: {cause}" if cause else status.value.text
        changed = status is not self.status
        self.status, self.why = status, "" if status is Status.READY else line
        if not changed:
            return
        again = status is Status.READY and self.served
        self.served = self.served or status is Status.READY
        self.on_change()
        if status.value.level:
            fields = {"instance": name, "state": status.name.lower(), "why": cause}
            self._log.write(status.value.level, f"{name} {line} again" if again else f"{name} {line}", fields)

    def close(self) -> None:
        """Log nothing more."""
        self._log.close()
