"""What became of an output is told by its first difference."""

import random

import pytest

from ares_dev.soak.cases import KNOWN_TOKENS, cases, compare

EXPECTED = random.Random(1).sample(range(1000), 60)


@pytest.mark.parametrize(
    ("got", "verdict"),
    [
        (EXPECTED, "right"),
        ([], "short"),
        (EXPECTED[:-1], "short"),
        (EXPECTED[:30] + EXPECTED[31:], "lost"),
        (EXPECTED[:30] + EXPECTED[33:], "lost"),
        (EXPECTED[1:], "lost"),
        (EXPECTED[:31] + EXPECTED[30:-1], "doubled"),
        (EXPECTED[:30] + EXPECTED[27:-3], "doubled"),
        ([*EXPECTED, EXPECTED[-1]], "doubled"),
        ([*EXPECTED[:30], 5000, *EXPECTED[31:]], "other"),
        ([*EXPECTED[:30], 5000, 5001, 5002], "other"),
    ],
)
def test_the_kind_of_a_difference(got: list[int], verdict: str) -> None:
    assert compare(got, EXPECTED) == verdict


def test_a_lost_token_near_the_end_is_a_difference() -> None:
    assert compare([*EXPECTED[:58], EXPECTED[59]], EXPECTED) != "right"


def test_cases_are_the_same_in_every_run_and_of_every_kind() -> None:
    assert cases() == cases()
    bodies = [case.body_for("m", KNOWN_TOKENS, stream=True) for case in cases()]
    assert {case.route for case in cases()} == {"completions", "chat/completions"}
    assert any(body.get("n") == 2 for body in bodies)
    assert any("seed" in body for body in bodies)
    assert any("presence_penalty" in body for body in bodies)
    assert max(len(body.get("prompt", ())) for body in bodies) > 1000
