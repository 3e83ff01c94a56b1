"""When a process that has ended is started again, and when it is given up. No process and no clock here."""

from dataclasses import dataclass
from enum import Enum, auto


class State(Enum):
    """What a process does."""

    STARTING = auto()
    """It runs and does not answer yet."""
    READY = auto()
    WAITING = auto()
    """It has ended, and is started again when its delay is over."""
    GIVEN_UP = auto()


class Event(Enum):
    """What happens to a process."""

    ANSWERED = auto()
    ENDED = auto()
    ENDED_ONCE_TOO_OFTEN = auto()
    STARTED = auto()


_NEXT = {
    (State.STARTING, Event.ANSWERED): State.READY,
    (State.STARTING, Event.ENDED): State.WAITING,
    (State.STARTING, Event.ENDED_ONCE_TOO_OFTEN): State.GIVEN_UP,
    (State.READY, Event.ENDED): State.WAITING,
    (State.READY, Event.ENDED_ONCE_TOO_OFTEN): State.GIVEN_UP,
    (State.WAITING, Event.STARTED): State.STARTING,
}


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How often, and after how long.

    Attributes
    ----------
    first_delay_s, longest_delay_s
        Delay of the first restart, which doubles with each further one, up to the longest.
    limit
        Restarts in a row; a process that ends once more is given up.
    steady_s
        A process that has been ready for so long begins a new row when it ends.
    """

    first_delay_s: float = 1.0
    longest_delay_s: float = 60.0
    limit: int = 5
    steady_s: float = 60.0


class Restarts:
    """The life of one process that is ready at `now`; all times are seconds on one clock.

    Attributes
    ----------
    state
        What it does.
    since
        When that began.
    in_row
        How often it has ended in a row, with less than `steady_s` of service between.
    """

    def __init__(self, policy: RestartPolicy, now: float) -> None:
        self.policy = policy
        self.state = State.READY
        self.since = now
        self.in_row = 0

    @property
    def delay_s(self) -> float:
        """How long it waits before it is started again."""
        doubled: float = self.policy.first_delay_s * 2 ** (self.in_row - 1)
        return min(doubled, self.policy.longest_delay_s)

    def ended(self, now: float) -> None:
        """Take note that it has ended."""
        steady = self.state is State.READY and now - self.since >= self.policy.steady_s
        self.in_row = 1 if steady else self.in_row + 1
        self._turn(Event.ENDED if self.in_row <= self.policy.limit else Event.ENDED_ONCE_TOO_OFTEN, now)

    def due(self, now: float) -> bool:
        """Whether it is to be started now."""
        return self.state is State.WAITING and now - self.since >= self.delay_s

    def started(self, now: float) -> None:
        """Take note that it was started again."""
        self._turn(Event.STARTED, now)

    def answered(self, now: float) -> None:
        """Take note that it answers again."""
        self._turn(Event.ANSWERED, now)

    def _turn(self, event: Event, now: float) -> None:
        self.state, self.since = _NEXT[self.state, event], now
