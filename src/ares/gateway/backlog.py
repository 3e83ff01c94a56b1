"""What waits outside decode, as running sums: every arrival asks, and must not look at all who wait."""

from collections.abc import Callable

from ares.gateway.entering import Entering


class Backlog:
    """The sequences that wait, and the tokens that they bring and are expected to generate.

    Parameters
    ----------
    expected
        Tokens that a sequence is expected to generate yet.
    """

    def __init__(self, expected: Callable[[Entering], float]) -> None:
        self._expected = expected
        self._work: dict[str, int] = {}
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._work)

    def note(self, sequence: Entering) -> None:
        """Count a sequence by what is known of it now, or no longer where it does not wait."""
        self.forget(sequence)
        # One that gave its room up waits too, and nothing new shall come while it does. It is never itself refused for
        # that: only arrivals ask.
        if sequence.waits:
            work = self._work[sequence.id] = sequence.tokens + round(self._expected(sequence))
            self.tokens += work

    def forget(self, sequence: Entering) -> None:
        """Count a sequence no longer."""
        self.tokens -= self._work.pop(sequence.id, 0)
