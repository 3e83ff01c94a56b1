"""When a process is started again, on a clock that the test turns."""

import itertools

import pytest

from ares.local_cluster.restarts import RestartPolicy, Restarts, State

POLICY = RestartPolicy(first_delay_s=1, longest_delay_s=6, limit=4, steady_s=60)


def test_delays_double_up_to_the_longest_and_then_it_is_given_up() -> None:
    life, now, delays = Restarts(POLICY, 0), 0.0, []
    while True:
        life.ended(now)
        if life.state is State.GIVEN_UP:
            break
        ended = now
        while not life.due(now):
            now += 0.5
        delays.append(now - ended)
        life.started(now)
        now += 30
        life.answered(now)  # ready each time, but never for long
        now += POLICY.steady_s - 1
    assert delays == [1, 2, 4, 6]
    assert life.in_row == 5
    assert not life.due(now + 1e9)


def test_who_has_served_for_long_begins_anew() -> None:
    life, now = Restarts(POLICY, 0), 0.0
    for _ in range(3 * POLICY.limit):
        now += POLICY.steady_s
        life.ended(now)
        assert (life.state, life.in_row, life.delay_s) == (State.WAITING, 1, 1)
        life.started(now + 1)
        now += 1 + 300  # a start may take long: it is no service
        life.answered(now)


def test_a_long_start_is_no_service() -> None:
    life = Restarts(POLICY, 0)
    life.ended(10)
    life.started(11)
    life.ended(11 + 10 * POLICY.steady_s)
    assert life.in_row == 2


def test_without_restarts_the_first_end_is_the_last() -> None:
    life = Restarts(RestartPolicy(limit=0), 0)
    life.ended(1000)
    assert life.state is State.GIVEN_UP


def test_what_cannot_happen_is_a_fault() -> None:
    def life(state: State) -> Restarts:
        made = Restarts(POLICY, 0)
        made.state = state
        return made

    allowed = {
        ("ended", State.STARTING),
        ("ended", State.READY),
        ("started", State.WAITING),
        ("answered", State.STARTING),
    }
    for event, state in itertools.product(("ended", "started", "answered"), State):
        if (event, state) in allowed:
            getattr(life(state), event)(1)
        else:
            with pytest.raises(KeyError):
                getattr(life(state), event)(1)
