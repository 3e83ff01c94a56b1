"""Whether the hidden states of a run are those that are computed again."""

import random

from ares.check.hidden_states import PROMPT_TOKENS, States, compared, cost
from ares.check.rows import Outcome
from tests.check.test_configuration import found

generator = random.Random(1)
STATES = {
    str(PROMPT_TOKENS + count): [generator.gauss(0.0, 1.0) for _ in range(64)] for count in range(12)
}  # of one output
AGAIN = {count: STATES[str(PROMPT_TOKENS + count)] for count in (5, 11)}


def test_states_that_differ_by_rounding_pass() -> None:
    rounded = {count: [round(value, 2) for value in state] for count, state in AGAIN.items()}
    row = compared(found("a"), STATES, dict(rounded))
    assert row.outcome is Outcome.PASS
    assert 0 < max(row.figures["errors"]) < 0.01


def test_states_of_the_token_before_or_of_other_values_fail() -> None:
    shifted = {count: STATES[str(PROMPT_TOKENS + count - 1)] for count in AGAIN}
    scaled = {count: [2 * value for value in state] for count, state in AGAIN.items()}
    for other in (shifted, scaled):
        row = compared(found("a"), STATES, dict(other))
        assert row.outcome is Outcome.FAIL
        assert "--predictor none" in row.advice


def test_a_step_that_the_hook_has_missed_fails() -> None:
    for other in ({5: AGAIN[5], 11: None}, {5: AGAIN[5], 12: AGAIN[11]}):
        row = compared(found("a"), STATES, other)
        assert row.outcome is Outcome.FAIL
        assert "missed" in row.value


def test_the_cost_is_the_time_of_a_step() -> None:
    row = cost(found("a"), States(steps=4, predictor_s=0.001))
    assert row.value.startswith("250 us")
    assert cost(found("a"), States(steps=4)).outcome is Outcome.NOT_RUN
