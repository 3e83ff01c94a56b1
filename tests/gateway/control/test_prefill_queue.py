"""What is queued on an instance."""

import pytest

from ares.gateway.control import prefill_queue
from ares.gateway.control.prefill_queue import PrefillQueue


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(prefill_queue, "time", made)
    return made


def test_what_was_sent_is_queued_until_it_ends(clock: Clock) -> None:
    queue = PrefillQueue()
    queue.begin(1, 100)
    queue.begin(2, 50, expires_s=3.0)
    assert (len(queue), queue.tokens) == (2, 150)
    clock.now += 3.0
    assert (len(queue), queue.tokens) == (1, 100)
    queue.end(1)
    queue.end(7)
    assert (len(queue), queue.tokens) == (0, 0)
    assert 50 < queue.mean_tokens < 100, "of all that were sent"


def test_what_was_sent_since_a_moment(clock: Clock) -> None:
    queue = PrefillQueue()
    for number in (1, 2, 3, 4):
        clock.now += 1.0
        queue.begin(number, 10)
    clock.now += 1.0
    queue.begin(1, 10)  # again
    queue.end(3)
    assert [queue.sent_since(100.0 + at) for at in range(7)] == [3, 3, 2, 2, 1, 0, 0]


def test_what_stays_on_the_instance_takes_memory_until_a_report_shows_it(clock: Clock) -> None:
    queue = PrefillQueue()
    queue.begin(1, 10, expires_s=0.001)
    queue.place(100)
    clock.now += 1.0
    queue.place(50)
    assert queue.tokens == 0, "computed"
    assert [queue.placed_since(moment) for moment in (99.0, 100.5, 101.0)] == [150, 50, 0]


def test_what_no_report_has_shown_for_long_is_forgotten(clock: Clock) -> None:
    queue = PrefillQueue()
    for _ in range(100):
        queue.place(10)
        clock.now += 1.0
    assert queue.placed_since(0.0) == 610


def test_the_sum_follows_each_end(clock: Clock) -> None:
    queue = PrefillQueue()
    for number, expires_s in enumerate([5.0, None, 2.0, None]):
        queue.begin(number, 10**number, expires_s)
    queue.begin(1, 20)  # sent again
    assert (queue.tokens, len(queue)) == (1121, 4)
    clock.now += 2.0
    assert (queue.tokens, len(queue)) == (1021, 3)
    queue.end(3)
    queue.end(3)
    clock.now += 3.0
    assert (queue.tokens, len(queue)) == (20, 1)
