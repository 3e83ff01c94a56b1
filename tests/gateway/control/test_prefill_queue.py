"""What is queued on an instance, and the fitted time of a prompt."""

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
    queue.end(1, None)
    queue.end(7, 20)
    assert (len(queue), queue.tokens, queue.coefficients) == (0, 0, None)


def test_what_was_sent_since_a_moment(clock: Clock) -> None:
    queue = PrefillQueue()
    for number in (1, 2, 3, 4):
        clock.now += 1.0
        queue.begin(number, 10)
    clock.now += 1.0
    queue.begin(1, 10)  # again
    queue.end(3, None)
    assert [queue.sent_since(100.0 + at) for at in range(7)] == [3, 3, 2, 2, 1, 0, 0]


@pytest.mark.parametrize("together", [1, 3])
def test_the_time_of_a_prompt_is_that_after_the_one_before(clock: Clock, together: int) -> None:
    """Prompts queue behind each other, and some are computed in one step."""
    queue, number = PrefillQueue(), 0
    for size in range(100, 1300, 40):
        for one in range(together):
            queue.begin(number + one, size)
        clock.now += 0.01 + 1e-3 * size * together
        for one in range(together):
            queue.end(number + one, size)
            clock.now += 1e-4
        number += together
    fitted = queue.coefficients
    assert fitted is not None
    assert fitted == (pytest.approx(0.01, rel=0.2), pytest.approx(1e-3, rel=0.05))


def test_the_mean_time_of_a_token_bears_answers_that_come_late(clock: Clock) -> None:
    """Two prompts of 2 s end, one after the other; a gateway that was busy sees both at once, in either way 4 s."""
    queue = PrefillQueue()
    assert queue.mean_token_s is None
    for number in range(20):
        queue.begin(number, 1000)
        queue.begin(100 + number, 1000)
        clock.now += 3.995
        queue.end(number, 1000)
        clock.now += 0.005
        queue.end(100 + number, 1000)
    assert queue.mean_token_s == pytest.approx(2e-3, rel=0.05)
