"""Accepts the connections to an address, and hands each to the process that has the fewest."""

import contextlib
import errno
import fcntl
import logging
import socket
import struct
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass

from ares import addresses

logger = logging.getLogger(__name__)

# What the parent tells a process; `CONNECTION` comes with a file descriptor.
CONNECTION, SHUT_DOWN = b"c", b"s"
# What a process tells its parent: that it takes connections, or takes no more.
TAKES, LEAVES = b"t", b"l"

# As uvicorn's.
_BACKLOG = 2048
# Connections that are accepted at a time: signals and the ends of processes are looked at in between.
_AT_A_TIME = 64
# The process has too many files open, or the system has, or no memory: it may have some later.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE_S = 1.0


def listen(host: str, port: int) -> list[socket.socket]:
    """Listen on all addresses of a host, as asyncio does; AddressError where that fails.

    The sockets do not block, and the connections from them send without delay.
    """
    found = dict.fromkeys(
        (family, address) for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    )
    with contextlib.ExitStack() as unless_all:
        made: list[socket.socket] = []
        for family, address in found:
            listener = unless_all.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted ones inherit it
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                listener.bind(address)
                listener.listen(_BACKLOG)
            except OSError as error:
                where = addresses.with_port(str(address[0]), int(address[1]))
                raise addresses.AddressError(f"cannot listen on {where} ({error.strerror})") from error
            listener.setblocking(False)
            made.append(listener)
        unless_all.pop_all()
    return made


@dataclass(slots=True)
class Link:
    """The parent's end of the socket pair to one process.

    The pair outlasts the process: what a process has not taken when it ends, the one started in its place takes.
    """

    here: socket.socket
    there: socket.socket
    takes: bool = False

    @property
    def unread(self) -> int:
        """How many bytes the process has not read yet: one for each connection that it has not taken."""
        found: int = struct.unpack("i", fcntl.ioctl(self.there, termios.FIONREAD, bytes(4)))[0]
        return found

    @classmethod
    def make(cls) -> "Link":
        """Make a pair that does not block."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        here.setblocking(False)
        there.setblocking(False)
        return cls(here, there)


class Acceptor:
    """Accepts connections for the process with the fewest open ones; of several, one after the other.

    How many a process was given does not count: those of probes end at once, those of streams last.

    Parameters
    ----------
    links
        To the processes, in the order of their numbers.
    responds
        Whether a process runs, by its number: one that hangs gets connections only where all do.
    connections
        How many connections a process has taken that are open, by its number.

    Attributes
    ----------
    holds
        Whether it has a connection that no process has room for yet; it accepts no other one before that has gone.
    pauses_until
        When to accept again (`time.monotonic`): the system could not take another connection a moment ago.
    """

    def __init__(self, links: list[Link], responds: Callable[[int], bool], connections: Callable[[int], int]) -> None:
        self._links = links
        self._responds = responds
        self._connections = connections
        self._next = 0
        self._held: socket.socket | None = None
        self.pauses_until = 0.0

    @property
    def holds(self) -> bool:  # noqa: D102 - above
        return self._held is not None

    def accept(self, listener: socket.socket) -> None:
        """Accept what waits at a listener that does not block, and hand it out."""
        for _ in range(_AT_A_TIME):
            if self._held is not None:
                return
            try:
                self._held, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    logger.error("cannot accept a connection: %s; trying again in %g s", error, _PAUSE_S)
                    self.pauses_until = time.monotonic() + _PAUSE_S
                return  # otherwise the client has left already
            self.hand_out()

    def hand_out(self) -> None:
        """Hand the connection that is held to a process that has room for it."""
        if self._held is None:
            return
        count = len(self._links)
        taking = [n for n in ((self._next + n) % count for n in range(count)) if self._links[n].takes]
        for number in sorted(taking, key=self._load):
            if _send(self._links[number], self._held):
                self._held.close()
                self._held = None
                self._next = (number + 1) % count
                return

    def _load(self, number: int) -> tuple[bool, int]:
        return not self._responds(number), self._connections(number) + self._links[number].unread

    def close(self) -> None:
        """Close the connection that is held."""
        if self._held is not None:
            self._held.close()
            self._held = None


def _send(link: Link, connection: socket.socket) -> bool:
    try:
        socket.send_fds(link.here, [CONNECTION], [connection.fileno()])
    except OSError:  # no room: the process has not taken the last ones yet
        return False
    return True
