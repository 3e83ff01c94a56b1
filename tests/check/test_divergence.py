"""When outputs after transfers differ more often than chance explains."""

import pytest

from ares.check.divergence import Divergence, add


@pytest.mark.parametrize(
    ("different", "control_different", "significant"),
    [(0, 0, False), (1, 0, False), (12, 0, True), (6, 5, False), (8, 0, True), (12, 12, False)],
)
def test_a_control_tells_rounding_from_a_fault(different: int, control_different: int, significant: bool) -> None:
    assert Divergence(12, different, 12, control_different).significant is significant


def test_the_probability_is_that_of_fishers_test() -> None:
    # The lady tasting tea: three of four right by chance, 17/70.
    assert Divergence(4, 3, 4, 1).by_chance == pytest.approx(17 / 70)


def test_a_sum_has_the_earliest_difference() -> None:
    total = add([Divergence(1, 1, 1, 0, 40), Divergence(1, 0, 1, 1), Divergence(1, 1, 1, 0, 13)])
    assert total == Divergence(3, 2, 3, 1, 13)
    assert total.text() == "2 of 3 outputs differ, first at token 13; without a transfer 1 of 3"
    assert add([Divergence(2, 0)]).text() == "tokens equal"
