"""Which requests are recorded: a fixed share of them, or so many at a time.

Both go by the request's name, which is the same on all instances that it runs on: all parts of an output are to be
recorded, or none. A request is chosen when it arrives, and recorded to its end however long that takes: to choose among
those that already run would choose the long ones more often.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

# A request that is only prefilled here runs elsewhere afterwards. Its place stays taken for about as long, so that
# prefill and decode instances with the same load choose the same requests.
_PREFILLED_S = 30.0
# How the threshold of `AtOnce` changes with a request that is not taken.
_RISE, _RISE_WHEN_EMPTY, _FALL = 1.01, 1.2, 0.9


def share_of(name: str) -> float:
    """Return a number from 0 to 1 by which a request is chosen, the same on every instance."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


class Sample(Protocol):
    """Chooses the requests to record."""

    def takes(self, name: str) -> bool:
        """Whether a request that arrives is to be recorded; if so, `release` is called at its end."""

    def release(self, *, prefill_only: bool) -> None:
        """Note that a request that was taken has ended here."""


class FixedShare:
    """Takes a fixed share of the requests.

    Parameters
    ----------
    share
        From 0 to 1.
    """

    def __init__(self, share: float) -> None:
        self._share = share

    def takes(self, name: str) -> bool:
        """Whether its number is below the share."""
        return share_of(name) < self._share

    def release(self, *, prefill_only: bool) -> None:
        """Do nothing: the share does not depend on what runs."""


class AtOnce:
    """Takes requests while fewer than so many are being recorded.

    It takes those whose number (`share_of`) is below a threshold, which falls where a request finds no place and rises
    where at most half of them are taken. So instances of about the same load choose about the same requests: at ten
    times more requests than places, 79 % of them in a simulation, where chance alone would choose a tenth.

    Parameters
    ----------
    places
        How many requests are recorded at the same time.
    """

    def __init__(self, places: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._places = places
        self._clock = clock
        self._threshold = 1.0
        self._running = 0
        # When the places of requests that were only prefilled here become free.
        self._prefilled: deque[float] = deque()

    def takes(self, name: str) -> bool:
        """Whether its number is below the threshold, and there is a place for it."""
        while self._prefilled and self._prefilled[0] <= self._clock():
            self._prefilled.popleft()
        taken = self._running + len(self._prefilled)
        if share_of(name) >= self._threshold:
            if taken <= self._places // 2:
                self._threshold = min(1.0, self._threshold * (_RISE if taken else _RISE_WHEN_EMPTY))
            return False
        if taken >= self._places:
            self._threshold *= _FALL
            return False
        self._running += 1
        return True

    def release(self, *, prefill_only: bool) -> None:
        """Free its place, now or in a while."""
        self._running -= 1
        if prefill_only:
            self._prefilled.append(self._clock() + _PREFILLED_S)
