"""The requests that wait outside decode, as running sums: every arrival is checked against them."""

from collections.abc import Callable
from typing import Self

from ares.gateway.processes.shared_counts import SharedCounts
from ares.gateway.session.session import Session


class Backlog:
    """The sessions that wait, and the tokens that they have and are expected to generate.

    Parameters
    ----------
    expected_tokens
        Returns the tokens that a session will still generate, by the median.
    counts
        Those that the processes of the gateway share.

    Attributes
    ----------
    tokens
        Of the sessions of this process.
    """

    def __init__(self, expected_tokens: Callable[[Session], float], counts: SharedCounts | None = None) -> None:
        self._expected_tokens = expected_tokens
        self._counts = counts or SharedCounts()
        # Of each session its work, and what that was computed from.
        self._work: dict[str, tuple[int, object]] = {}
        self._reserved = 0
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._work) + self._reserved

    def everywhere(self) -> tuple[int, int]:
        """Return how many sessions wait at all processes of the gateway, and their tokens."""
        count, tokens = self._counts.other_backlogs()
        return len(self) + count, self.tokens + tokens

    def reserve(self, count: int, tokens: int) -> None:
        """Count so many sessions more that are still to come, and tokens; negative numbers give them back."""
        self._reserved += count
        self._count(tokens)

    def hand_over(self, tokens: int) -> None:
        """Count one reserved session with so many tokens no longer: `update` counts it next.

        The other processes do not hear of it before that: they would take its room for free.
        """
        self._reserved -= 1
        self.tokens -= tokens

    def update(self, session: Session) -> None:
        """Count a session with its present tokens if it waits, else not any more.

        What is expected of it is computed again only where its tokens, or what was predicted of it, are others.
        """
        # Suspended sessions count too: arrivals are refused while many of them wait. They are never refused themselves.
        if not session.waits:
            self.remove(session)
            return
        known = (session.tokens, session.predicted)
        before, computed_from = self._work.get(session.id, (0, None))
        if known != computed_from:
            work = session.tokens + round(self._expected_tokens(session))
            self._work[session.id] = work, known
            self._count(work - before)

    def remove(self, session: Session) -> None:
        """Count a session no longer."""
        work, _ = self._work.pop(session.id, (0, None))
        self._count(-work)

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        self._counts.set_backlog(len(self), self.tokens)


class BacklogReservation:
    """Room in a backlog for the sessions of a request that is still tokenised, which may take long.

    Leaving the context gives back what has not been used.
    """

    def __init__(self, backlog: Backlog, count: int) -> None:
        self._backlog = backlog
        self._count = self._tokens = 0
        self._change(count, 0)

    def add_tokens(self, tokens: int) -> None:
        """Reserve the tokens of the prompts too, now that their length is known."""
        self._change(0, tokens)

    def use(self, tokens: int) -> None:
        """Give back the part of one session with so many prompt tokens, which is added to the backlog next."""
        self._count -= 1
        self._tokens -= tokens
        self._backlog.hand_over(tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._change(-self._count, -self._tokens)

    def _change(self, count: int, tokens: int) -> None:
        self._count += count
        self._tokens += tokens
        self._backlog.reserve(count, tokens)
