"""What an instance believes of requests that are announced to it."""

from ares.engine.expected_requests import LONGEST_S, MOST, ExpectedRequests


def test_a_request_is_expected_until_it_comes_or_is_given_up() -> None:
    expected = ExpectedRequests()
    assert expected.until(100.0) == 100.0
    expected.add("first", 1.0, 100.0)
    expected.add("second", 2.0, 100.0)
    assert expected.until(100.5) == 102.0
    expected.arrived("second")
    assert expected.until(100.5) == 101.0
    assert expected.until(101.5) == 101.5


def test_one_that_was_not_announced_may_come() -> None:
    expected = ExpectedRequests()
    expected.arrived("stranger")
    assert expected.until(1.0) == 1.0


def test_nothing_is_expected_for_long() -> None:
    expected = ExpectedRequests()
    expected.add("late", 1e9, 100.0)
    assert expected.until(100.0) == 100.0 + LONGEST_S


def test_many_are_not_believed_until_others_are_given_up() -> None:
    expected = ExpectedRequests()
    for number in range(MOST):
        expected.add(f"early-{number}", 1.0, 100.0)
    expected.add("one more", 3.0, 100.0)
    assert expected.until(100.0) == 101.0
    expected.add("later", 3.0, 102.0)
    assert expected.until(102.0) == 105.0
