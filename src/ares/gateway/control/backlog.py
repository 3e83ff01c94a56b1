"""What waits outside decode, as running sums: every arrival asks, and must not look at all who wait."""

from collections.abc import Callable
from typing import Self

from ares.gateway.session.session import Session


class Backlog:
    """The sequences that wait, and the tokens that they bring and are expected to generate.

    Parameters
    ----------
    expected
        Tokens that a sequence is expected to generate yet.
    """

    def __init__(self, expected: Callable[[Session], float]) -> None:
        self._expected = expected
        self._work: dict[str, int] = {}
        self.tokens = 0
        self.reserved = 0

    def __len__(self) -> int:
        return len(self._work) + self.reserved

    def note(self, sequence: Session) -> None:
        """Count a sequence by what is known of it now, or no longer where it does not wait."""
        self.forget(sequence)
        # One that gave its room up waits too, and nothing new shall come while it does. It is never itself refused for
        # that: only arrivals ask.
        if sequence.waits:
            work = self._work[sequence.id] = sequence.tokens + round(self._expected(sequence))
            self.tokens += work

    def forget(self, sequence: Session) -> None:
        """Count a sequence no longer."""
        self.tokens -= self._work.pop(sequence.id, 0)


class Places:
    """Places in a backlog for the sequences of a request that is not as far yet: it may be tokenised for long.

    Leaving the context gives back what nobody has taken.
    """

    def __init__(self, backlog: Backlog, count: int) -> None:
        self._backlog = backlog
        self._count = self._tokens = 0
        self._change(count, 0)

    def bring(self, tokens: int) -> None:
        """Count the prompts too, now that their length is known."""
        self._change(0, tokens)

    def take(self, tokens: int) -> None:
        """Make way for a sequence with a prompt of so many tokens, which is noted next."""
        self._change(-1, -tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._change(-self._count, -self._tokens)

    def _change(self, count: int, tokens: int) -> None:
        self._count += count
        self._tokens += tokens
        self._backlog.reserved += count
        self._backlog.tokens += tokens
