"""The parent of the processes of one address: it starts them, accepts for them, and starts again what ends."""

import contextlib
import logging
import multiprocessing
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess

from ares.gateway.processes.acceptor import LEAVES, SHUT_DOWN, TAKES, Acceptor, Link
from ares.gateway.processes.shared_counts import SharedCounts

logger = logging.getLogger(__name__)

Serve = Callable[[socket.socket], None]
"""Runs a process until it is told over the link to shut down."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Between two attempts to hand out a connection that no process has room for.
_RETRY_S = 0.005
# Between two attempts to tell a process to shut down that has not read its link.
_RETRY_SHUTDOWN_S = 0.05
# Between two looks, while processes end, at whether they do.
_LOOK_S = 0.5
# A process that ends again within this long after its start is started again later and later.
_SOON_S, _LONGEST_PAUSE_S = 60.0, 60.0
# After a start that failed.
_SHORTEST_PAUSE_S = 1.0
# uvicorn's status where a server does not start.
_NOT_STARTED = 3


@dataclass(slots=True)
class _Child:
    """One process, and the next one in its place."""

    number: int
    link: Link
    process: BaseProcess | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    soon: int = 0
    """How often it has ended soon after its start, or could not be started, without a longer life in between."""
    shutdown_due: bool = False
    """Whether it has not been told yet to shut down: it had not read its link for a while."""


class Parent:
    """Runs the processes of an address until a signal ends them.

    It has no threads and no event loop, so that it can fork at any time; each process has what it had loaded.

    Parameters
    ----------
    listeners
        The sockets of the address.
    counts
        Those that the processes share.
    serve
        What a process does.
    """

    def __init__(self, listeners: list[socket.socket], counts: SharedCounts, serve: Serve) -> None:
        self._listeners = listeners
        self._counts = counts
        self._serve = serve
        self._children = [_Child(number, Link.make()) for number in range(counts.processes)]
        self._acceptor = Acceptor([child.link for child in self._children], counts.responds, counts.connections)
        # Not epoll: what it watches would be shared with the processes.
        self._selector = selectors.PollSelector()
        self._accepting = False
        self._starts = 0
        self._signals: list[int] = []
        self._orders = 0
        self._served = False
        self._failed = False
        self._closed = False

    def run(self) -> int:
        """Serve until all processes have ended; return the exit status, or the negative number of the signal it got."""
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._let_go)
            self._wakeup, written = socket.socketpair()
            for end in (self._wakeup, written):
                end.setblocking(False)
                cleanup.callback(end.close)
            self._to_close_in_child = [self._wakeup, written, *self._listeners]
            cleanup.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False))
            for number in _SIGNALS:
                cleanup.callback(signal.signal, number, signal.signal(number, self._take_signal))
            self._selector.register(self._wakeup, selectors.EVENT_READ, self._read_wakeup)
            for child in self._children:
                self._selector.register(child.link.here, selectors.EVENT_READ, partial(self._read, child))
                self._start(child)
            while any(child.process is not None for child in self._children) or self._pauses():
                self._step()
            self._close_listeners()
        if self._signals:
            return -self._signals[0]
        return _NOT_STARTED if self._failed else 0

    def _step(self) -> None:
        for key, _ in self._selector.select(self._timeout()):
            key.data()
        while self._orders < len(self._signals):
            self._order_shutdown()
        for child in self._children:
            if child.shutdown_due:
                self._tell_to_shut_down(child)
        self._acceptor.hand_out()
        self._accept_if(self._may_accept())
        if self._ending and not any(self._serves(child) for child in self._children):
            self._close_listeners()
        for child in self._children:
            if child.process is None and not self._ending and time.monotonic() >= child.start_at:
                logger.info("process %d of this gateway starts again", child.number)
                self._counts.count_restart(child.number)
                self._start(child)

    def _timeout(self) -> float | None:
        times = [max(0.0, at - time.monotonic()) for at in self._pauses()]
        if self._acceptor.holds and any(child.link.takes for child in self._children):
            times.append(_RETRY_S)
        if (pause_s := self._acceptor.pauses_until - time.monotonic()) > 0:
            times.append(pause_s)
        if self._ending:
            times.append(_RETRY_SHUTDOWN_S if any(child.shutdown_due for child in self._children) else _LOOK_S)
        return min(times, default=None)

    def _pauses(self) -> list[float]:
        """Return when processes start again that have ended."""
        return [] if self._ending else [child.start_at for child in self._children if child.process is None]

    @property
    def _ending(self) -> bool:
        return bool(self._signals) or self._failed

    def _serves(self, child: _Child) -> bool:
        """Whether a process takes connections and, where all are to end, runs: one that hangs may never end."""
        return child.link.takes and (not self._ending or self._counts.responds(child.number))

    def _may_accept(self) -> bool:
        return (
            not self._closed
            and not self._acceptor.holds
            and time.monotonic() >= self._acceptor.pauses_until
            and any(self._serves(child) for child in self._children)
        )

    def _let_go(self) -> None:
        """Let go of the address and of all processes, which end then: this one may end by an error."""
        self._close_listeners()
        for child in self._children:
            child.link.here.close()

    def _close_listeners(self) -> None:
        self._accept_if(False)
        self._closed = True
        self._acceptor.close()
        for listener in self._listeners:
            listener.close()

    def _accept_if(self, wanted: bool) -> None:
        if wanted == self._accepting:
            return
        self._accepting = wanted
        for listener in self._listeners:
            if wanted:
                self._selector.register(listener, selectors.EVENT_READ, partial(self._acceptor.accept, listener))
            else:
                self._selector.unregister(listener)

    # --- processes ---

    def _start(self, child: _Child) -> None:
        start = self._starts
        self._starts += 1
        name = f"{self._counts.address_name}-{start}"
        context = multiprocessing.get_context("fork")
        process = context.Process(target=self._run_child, args=(child, start), name=name)
        child.started_at = time.monotonic()
        try:
            process.start()
        except OSError as error:  # for example too many processes, or no memory
            pause_s = self._set_pause(child, least_s=_SHORTEST_PAUSE_S)
            why = "process %d of this gateway cannot be started: %s; trying again in %g s"
            logger.error(why, child.number, error, pause_s)
            return
        child.process = process
        self._selector.register(process.sentinel, selectors.EVENT_READ, partial(self._ended, child))

    def _set_pause(self, child: _Child, least_s: float = 0.0) -> float:
        """Set when a process starts again that has ended, or could not be started; return the seconds until then."""
        child.soon = child.soon + 1 if time.monotonic() - child.started_at < _SOON_S else 0
        pause_s = max(least_s, min(_LONGEST_PAUSE_S, 2.0 ** (child.soon - 2)) if child.soon > 1 else 0.0)
        child.start_at = time.monotonic() + pause_s
        return pause_s

    def _run_child(self, child: _Child, start: int) -> None:
        """Be a process (after the fork)."""
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the parent passes them on, also those of a terminal to all of us
        # With the last copy of the parent's ends, processes see that the parent has ended.
        for one in (*self._to_close_in_child, *(c.link.here for c in self._children)):
            one.close()
        for other in self._children:
            if other is not child:
                other.link.there.close()
        self._acceptor.close()
        self._counts.begin(child.number, start)
        self._serve(child.link.there)

    def _read(self, child: _Child) -> None:
        """Read what a process says."""
        with contextlib.suppress(BlockingIOError):
            while message := child.link.here.recv(1):
                child.link.takes = message == TAKES if message in (TAKES, LEAVES) else child.link.takes
                self._served |= child.link.takes

    def _ended(self, child: _Child) -> None:
        process = child.process
        assert process is not None  # noqa: S101 - for the type checker
        self._selector.unregister(process.sentinel)
        process.join()
        self._read(child)  # what it has said last
        child.link.takes = False
        child.process = None
        child.shutdown_due = False
        self._counts.clear(child.number)
        status = process.exitcode or 0
        process.close()
        if self._ending:
            return
        how = f"was killed ({_signal_name(-status)})" if status < 0 else f"has ended with status {status}"
        if not self._served:
            logger.error("process %d of this gateway %s before it served: the gateway ends", child.number, how)
            self._failed = True
            self._order_shutdown()
            return
        logger.error(
            "process %d of this gateway %s; its streams have ended, and it is started again in %g s",
            child.number,
            how,
            self._set_pause(child),
        )

    # --- the end ---

    def _take_signal(self, number: int, _: object) -> None:
        self._signals.append(number)

    def _read_wakeup(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wakeup.recv(64):
                pass

    def _order_shutdown(self) -> None:
        """Tell every process to shut down; a second time, at once, and one that hangs or is stopped is killed then."""
        self._orders += 1
        for child in self._children:
            if child.process is None:
                continue
            if not self._counts.responds(child.number):
                if self._orders > 1:
                    child.process.kill()
                    continue
                logger.warning("process %d of this gateway does not run now; a second signal kills it", child.number)
            self._tell_to_shut_down(child)

    def _tell_to_shut_down(self, child: _Child) -> None:
        """Tell a process to shut down; again later where it has not read for a while, if it was told the first time."""
        try:
            child.link.here.send(SHUT_DOWN)
            child.shutdown_due = False
        except BlockingIOError:
            child.shutdown_due = True
            if self._orders > 1 and child.process is not None:
                child.process.kill()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
