"""Counts that the processes of one address share: each writes its own row, and reads the rows of the others."""

import asyncio
import contextlib
import fcntl
import logging
import mmap
import os
import time
import uuid
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

logger = logging.getLogger(__name__)

# Columns of a row; streams of each client key and what is placed on instances follow. The first row has the preset.
_START, _RESTARTS, _BEAT_MS, _BACKLOG, _BACKLOG_TOKENS, _WAITING, _CONNECTIONS, _PRESET, _FIXED = range(9)
# Instances for which a process has room in its row: as many as a source may name (discovery/base.py). Of each: the hash
# of its URL, 0 where the place is free; tokens; growth.
_MOST_INSTANCES, _COLUMNS = 4096, 3
# Between two attempts to take the turn.
_RETRY_S = 0.001
# A process whose event loop has not run for longer hangs, or is stopped.
_SILENT_S = 2.0


class Placed(NamedTuple):
    """What another process has placed on an instance, in tokens of KV.

    Attributes
    ----------
    gateway
        Its name, with which the keys of its requests begin.
    tokens
        Of all its requests there.
    growth
        What those of them that the instance does not report yet are expected to generate.
    """

    gateway: str
    tokens: int
    growth: int


class SharedCounts:
    """The counts of an address, made before its processes; of a single one, whose siblings count nothing.

    A row is written by its process alone, and a count is one aligned 64-bit number, so that no reader needs a lock.

    Parameters
    ----------
    processes
        How many processes there are.
    keys
        Number of client keys.
    presets
        Names of the presets that may be in force, the first one from the start.

    Attributes
    ----------
    address_name
        What the names of all processes begin with.
    process
        The number of this process.
    """

    def __init__(self, processes: int = 1, keys: int = 0, presets: Sequence[str] = ("",)) -> None:
        self.address_name = uuid.uuid4().hex[:8]
        self.processes = processes
        self.process = 0
        self._presets = tuple(presets)
        self._others: list[SharedCounts] = []
        places = _MOST_INSTANCES if processes > 1 else 0
        shape = processes, _FIXED + keys + _COLUMNS * places
        self._file: int | None = None
        if processes == 1:
            self._table = np.zeros(shape, dtype=np.int64)
        else:
            # A file in memory: processes inherit the descriptor, and a lock on it ends with the process that holds it.
            self._file = os.memfd_create("ares-gateway-counts")
            size = 8 * shape[0] * shape[1]
            os.truncate(self._file, size)
            self._table = np.frombuffer(mmap.mmap(self._file, size), dtype=np.int64).reshape(shape)
        self._placed = self._table[:, _FIXED + keys :].reshape(processes, places, _COLUMNS)
        # Where instances, by their URLs, are in the row of each process; in another's, where last found.
        self._places: list[dict[str, int]] = [{} for _ in range(processes)]
        self._full = False

    def of_another_model(self) -> "SharedCounts":
        """Return counts of the same processes for another model: who they are, and the preset, these say."""
        other = SharedCounts(self.processes)
        other.address_name, other.process = self.address_name, self.process
        self._others.append(other)
        return other

    # --- the processes ---

    def begin(self, process: int, start: int) -> None:
        """Be a process from now on: the `start`-th that was started, from 0; its row is empty."""
        self.process = process
        self.clear(process)
        self._places[process] = {}
        self._table[process, _START] = start
        for other in self._others:
            other.begin(process, start)

    def clear(self, process: int) -> None:
        """Forget what a process that has ended had counted."""
        kept = self._table[process, [_RESTARTS, _PRESET]]
        self._table[process] = 0
        self._table[process, [_RESTARTS, _PRESET]] = kept
        for other in self._others:
            other.clear(process)

    def gateway_of(self, process: int) -> str:
        """Return the name of a process as a gateway: another one each time that it starts."""
        return f"{self.address_name}-{self._table[process, _START]}" if self.processes > 1 else self.address_name

    @property
    def gateway(self) -> str:
        """The name of this process as a gateway."""
        return self.gateway_of(self.process)

    @property
    def others(self) -> list[int]:
        """The numbers of the other processes."""
        return [n for n in range(self.processes) if n != self.process]

    @property
    def restarts(self) -> list[int]:
        """How often each process was started again."""
        found: list[int] = self._table[:, _RESTARTS].tolist()
        return found

    def count_restart(self, process: int) -> None:
        """Count that a process is started again."""
        self._table[process, _RESTARTS] += 1

    @property
    def preset(self) -> str:
        """The preset in force: a process that starts later takes it over."""
        return self._presets[int(self._table[0, _PRESET])]

    @preset.setter
    def preset(self, name: str) -> None:
        self._table[0, _PRESET] = self._presets.index(name)

    def beat(self) -> None:
        """Note that this process runs."""
        self._table[self.process, _BEAT_MS] = time.monotonic_ns() // 1_000_000

    def responds(self, process: int) -> bool:
        """Whether a process has run a moment ago."""
        return bool(time.monotonic() - self._table[process, _BEAT_MS] / 1000 < _SILENT_S)

    def set_connections(self, count: int) -> None:
        """Count the clients' connections that this process has taken and that are open."""
        self._table[self.process, _CONNECTIONS] = count

    def connections(self, process: int) -> int:
        """Return how many clients' connections a process has."""
        return int(self._table[process, _CONNECTIONS])

    # --- limits ---

    def set_backlog(self, count: int, tokens: int) -> None:
        """Count the requests of this process that wait outside decode, and their tokens."""
        self._table[self.process, _BACKLOG] = count
        self._table[self.process, _BACKLOG_TOKENS] = tokens

    def other_backlogs(self) -> tuple[int, int]:
        """Return how many requests wait at the other processes, and their tokens."""
        return self._sum_of_others(_BACKLOG), self._sum_of_others(_BACKLOG_TOKENS)

    def set_waiting(self, count: int) -> None:
        """Count the requests of this process that wait for admission."""
        self._table[self.process, _WAITING] = count

    @property
    def waiting_elsewhere(self) -> int:
        """How many requests wait for admission at the other processes."""
        return self._sum_of_others(_WAITING)

    def set_streams(self, key: int, count: int) -> None:
        """Count the sequences of a client key that run at this process."""
        self._table[self.process, _FIXED + key] = count

    def other_streams(self, key: int) -> int:
        """Return how many sequences of a client key run at the other processes."""
        return self._sum_of_others(_FIXED + key)

    def _sum_of_others(self, column: int) -> int:
        if self.processes == 1:
            return 0
        return int(self._table[:, column].sum() - self._table[self.process, column])

    # --- room on instances ---

    def set_placed(self, placed: Mapping[str, tuple[int, int]]) -> None:
        """Count what this process has on each instance (`Placed`: tokens and growth), by its URL; forget others."""
        for url in [url for url in self._places[self.process] if url not in placed]:
            self._placed[self.process, self._places[self.process][url]] = 0
            for places in self._places:
                places.pop(url, None)
        for url, counts in placed.items():
            if (place := self._own_place(url)) is not None:
                self._placed[self.process, place, 1:] = counts

    def add_placed(self, url: str, tokens: int, growth: int) -> None:
        """Count one more request of this process on an instance."""
        if (place := self._own_place(url)) is not None:
            self._placed[self.process, place, 1:] += np.array((tokens, growth))

    def placed_by_others(self, url: str) -> Iterator[Placed]:
        """Return what each of the other processes has placed on an instance."""
        # The same in all processes, since they are forked.
        wanted = hash(url)
        for process, places in enumerate(self._places):
            if process == self.process:
                continue
            place = places.get(url)
            found, tokens, growth = (0, 0, 0) if place is None else self._placed[process, place].tolist()
            if found != wanted:
                # It has come to that process lately, or is elsewhere in the row of the one started in its place.
                if (place := self._find(process, wanted)) is None:
                    continue
                places[url] = place
                _, tokens, growth = self._placed[process, place].tolist()
            if tokens or growth:
                yield Placed(self.gateway_of(process), tokens, growth)

    def _own_place(self, url: str) -> int | None:
        """Return where an instance is in the row of this process, which may be full."""
        place = self._places[self.process].get(url)
        if place is None:
            place = self._find(self.process, 0)
            if place is None:
                if not self._full:
                    self._full = True
                    text = "more than %d instances: what is placed on further ones the other processes do not know"
                    logger.warning(text, _MOST_INSTANCES)
                return None
            self._placed[self.process, place, 0] = hash(url)
            self._places[self.process][url] = place
        return place

    def _find(self, process: int, wanted: int) -> int | None:
        """Return the first place with this hash in the row of a process."""
        found = np.flatnonzero(self._placed[process, :, 0] == wanted)
        return int(found[0]) if len(found) else None

    @contextlib.asynccontextmanager
    async def turn(self, within_s: float) -> AsyncIterator[None]:
        """Give room away while no other process does, so that the next one sees what was given.

        A process that holds the turn for longer than `within_s` seconds is not waited for: it may be stopped.
        """
        if self._file is None:
            yield
            return
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        while not (held := _lock(self._file)) and loop.time() < until:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(_RETRY_S)
        try:
            yield
        finally:
            if held:
                fcntl.lockf(self._file, fcntl.LOCK_UN)


def _lock(file: int) -> bool:
    """Lock a file for this process if no other one has; return whether it has the lock."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def preset_names(first: str, known: Collection[str]) -> list[str]:
    """Return the presets that may come into force: the one of the start, and the known ones."""
    return [first, *(name for name in known if name != first)]
