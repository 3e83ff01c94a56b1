"""Signals that end a command, all in the same way as Ctrl-C."""

import signal
from typing import Any


def signal_as_interrupt() -> None:
    """Let SIGTERM and SIGHUP end a command the way Ctrl-C does, so that what it started is stopped."""

    def interrupt(*_: Any) -> None:
        # A second signal must not cut the stopping short.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
