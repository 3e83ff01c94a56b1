"""The moves that ended last, and how many have ended."""

from collections import deque
from collections.abc import Iterable, Iterator

from ares.gateway.session.handover import MigrationRecord


class Moves:
    """The newest moves, the oldest of them first.

    Attributes
    ----------
    ended
        How many there were, those that are not kept any more included.
    """

    def __init__(self, kept: int) -> None:
        self._newest: deque[MigrationRecord] = deque(maxlen=kept)
        self.ended = 0

    def append(self, record: MigrationRecord) -> None:
        """Add a move that has ended."""
        self._newest.append(record)
        self.ended += 1

    def extend(self, records: Iterable[MigrationRecord]) -> None:
        """Add moves in the order in which they ended."""
        for record in records:
            self.append(record)

    def __len__(self) -> int:
        return len(self._newest)

    def __iter__(self) -> Iterator[MigrationRecord]:
        return iter(self._newest)

    def __reversed__(self) -> Iterator[MigrationRecord]:
        return reversed(self._newest)
