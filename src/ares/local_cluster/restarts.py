"""When a process that has ended is restarted, and when it is given up: a state machine without processes or clocks."""

from dataclasses import dataclass
from enum import Enum, auto


class State(Enum):
    """State of a process."""

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
    ENDED_TOO_OFTEN = auto()
    STARTED = auto()


_NEXT = {
    (State.STARTING, Event.ANSWERED): State.READY,
    (State.STARTING, Event.ENDED): State.WAITING,
    (State.STARTING, Event.ENDED_TOO_OFTEN): State.GIVEN_UP,
    (State.READY, Event.ENDED): State.WAITING,
    (State.READY, Event.ENDED_TOO_OFTEN): State.GIVEN_UP,
    (State.WAITING, Event.STARTED): State.STARTING,
}


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How often a process is restarted, and after how long.

    Attributes
    ----------
    first_delay_s, longest_delay_s
        Delay of the first restart, which doubles with each further one, up to the longest.
    limit
        Restarts in a row; a process that ends once more is given up.
    steady_s
        The count of restarts begins again for a process that has been ready for this long.
    """

    first_delay_s: float = 1.0
    longest_delay_s: float = 60.0
    limit: int = 5
    steady_s: float = 60.0


class Restarts:
    """The restarts of one process, which is ready at `now`; all times are seconds on one clock.

    Attributes
    ----------
    state
        Its state.
    since
        Since when.
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
        """Record that it has ended."""
        steady = self.state is State.READY and now - self.since >= self.policy.steady_s
        self.in_row = 1 if steady else self.in_row + 1
        self._apply(Event.ENDED if self.in_row <= self.policy.limit else Event.ENDED_TOO_OFTEN, now)

    def due(self, now: float) -> bool:
        """Whether it is due to be started."""
        return self.state is State.WAITING and now - self.since >= self.delay_s

    def started(self, now: float) -> None:
        """Record that it was started again."""
        self._apply(Event.STARTED, now)

    def answered(self, now: float) -> None:
        """Record that it answers again."""
        self._apply(Event.ANSWERED, now)

    def _apply(self, event: Event, now: float) -> None:
        self.state, self.since = _NEXT[self.state, event], now
