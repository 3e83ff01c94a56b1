"""Which recorded outputs may be trained on, and which may judge: short outputs must not be over-represented.

Outputs that began together end at different times, the short ones first. Of those that began after the oldest output
that still runs, only the short ones have ended; they wait until that one has ended too, or counts as lost.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from ares.predictor.shards import Outcome

_COMPLETE = (Outcome.STOP, Outcome.LIMIT)


@dataclass(slots=True)
class Recorded:
    """One output, joined from the pieces that have arrived (`predictor/pieces.py` joins their states).

    Attributes
    ----------
    request, prompt
        Ids.
    first, last
        Arrival numbers of its first and of its newest piece.
    seen
        When the newest arrived (`time.monotonic`).
    length
        Tokens so far.
    outcome
        How it has ended.
    count
        How many states there are.
    pairs
        And by arrival number.
    """

    request: str
    prompt: str
    first: int
    last: int
    seen: float
    length: int = 0
    outcome: Outcome = Outcome.RUNNING
    count: int = 0
    pairs: dict[int, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether its whole length is known."""
        return self.outcome in _COMPLETE

    def forget(self, number: int) -> bool:
        """Leave a piece out; return whether none is left."""
        self.count -= self.pairs.pop(number, 0)
        return not self.pairs

    def add(self, number: int, length: int, outcome: Outcome, pairs: int, now: float) -> None:
        """Add a piece; a stop token or the limit ends the output, otherwise its longest piece tells."""
        self.last, self.seen = number, now
        self.pairs[number] = self.pairs.get(number, 0) + pairs
        self.count += pairs
        if outcome in _COMPLETE:
            self.outcome = outcome if self.outcome is not Outcome.STOP else Outcome.STOP
        elif not self.complete and length >= self.length:
            self.outcome = outcome
        self.length = max(self.length, length)


def settled(outputs: Iterable[Recorded], now: float, stale_s: float) -> list[Recorded]:
    """Return the outputs of the cohort that have states, in order of arrival.

    Parameters
    ----------
    now
        `time.monotonic`.
    stale_s
        A running output without a piece for this long counts as lost, and is returned as well.
    """
    known = list(outputs)
    running = [one for one in known if one.outcome is Outcome.RUNNING and now - one.seen < stale_s]
    horizon = min((one.first for one in running), default=None)
    chosen = [one for one in known if one.count and (horizon is None or one.first < horizon)]
    return sorted(chosen, key=attrgetter("first"))


def newest(outputs: list[Recorded], most_pairs: int) -> list[Recorded]:
    """Return the newest outputs that together have at most so many states, at least one; the order stays."""
    total = 0
    for n, output in enumerate(reversed(outputs)):
        total += output.count
        if total > most_pairs and n:
            return outputs[len(outputs) - n :]
    return outputs


def files_of(outputs: Iterable[Recorded]) -> set[int]:
    """Return the arrival numbers of all pieces of some outputs."""
    return {number for output in outputs for number in output.pairs}
