"""The running sums of what waits, against a count over all that wait."""

import random
from dataclasses import dataclass
from typing import Any

from ares.gateway.control.backlog import Backlog, BacklogReservation
from ares.gateway.processes.shared_counts import SharedCounts


@dataclass
class Waiting:
    """What a backlog sees of a session."""

    id: str
    tokens: int
    waits: bool = True
    predicted: tuple[tuple[float, float, float], int] | None = None


def test_the_sums_are_those_of_the_sessions_that_wait() -> None:
    dice = random.Random(0)
    left: dict[str, float] = {}
    backlog = Backlog(lambda session: left[session.id])
    sessions: list[Any] = [Waiting(str(number), dice.randint(1, 50)) for number in range(20)]
    counted: dict[str, int] = {}
    for _ in range(2000):
        one = dice.choice(sessions)
        left[one.id] = dice.uniform(1, 100)
        one.tokens += 1
        counted.pop(one.id, None)
        if dice.random() < 0.1:
            backlog.remove(one)
        else:
            one.waits = dice.random() < 0.9
            backlog.update(one)
            if one.waits:
                # By what was known when it was counted; what comes later changes nothing.
                counted[one.id] = one.tokens + round(left[one.id])
        assert (len(backlog), backlog.tokens) == (len(counted), sum(counted.values()))


def test_a_prediction_changes_what_is_expected() -> None:
    expected = 10.0
    backlog = Backlog(lambda _: expected)
    session: Any = Waiting("one", 5)
    backlog.update(session)
    expected = 20.0
    backlog.update(session)
    assert backlog.tokens == 15  # nothing new is known of it
    session.predicted = (1.0, 2.0, 3.0), 5
    backlog.update(session)
    assert backlog.tokens == 25


def test_other_processes_do_not_see_a_session_leave_between_its_reservation_and_its_beginning() -> None:
    shown: list[tuple[int, int]] = []

    class Shown(SharedCounts):
        def set_backlog(self, count: int, tokens: int) -> None:
            shown.append((count, tokens))

    backlog = Backlog(lambda _: 10.0, Shown())
    with BacklogReservation(backlog, 2) as reservation:
        reservation.add_tokens(8)
        for name in ("one", "two"):
            session: Any = Waiting(name, 4)
            reservation.use(4)
            backlog.update(session)
    assert [count for count, _ in shown] == [2] * 5
    assert shown[-1] == (2, backlog.tokens) == (2, 28)
