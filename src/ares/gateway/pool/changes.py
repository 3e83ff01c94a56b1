"""The changes of instances' states, newest last: what the dashboard and `GET /admin/v1/instances` show of the past."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Change:
    """One change of an instance's state.

    Attributes
    ----------
    number
        Of the change, counted from 1.
    instance, url
        Its name then, and its URL.
    state
        `joined`, `gone`, or the name of a status (health.py) in lower case.
    why
        The reason, and what to do; may be empty.
    at
        Time of `time.time`.
    """

    number: int
    instance: str
    url: str
    state: str
    why: str
    at: float = field(default_factory=time.time)


class Changes:
    """The newest changes.

    Parameters
    ----------
    kept
        How many.
    """

    def __init__(self, kept: int) -> None:
        self._kept: deque[Change] = deque(maxlen=kept)
        self._number = 0

    @property
    def number(self) -> int:
        """Of the newest change; 0 before any."""
        return self._number

    def add(self, instance: str, url: str, state: str, why: str) -> None:
        """Note a change."""
        self._number += 1
        self._kept.append(Change(self._number, instance, url, state, why))

    def since(self, number: int) -> Iterator[Change]:
        """Return those with a higher number that are still kept, oldest first."""
        return (change for change in self._kept if change.number > number)
