"""The role of an instance: it changes when the work that the next one excludes has ended, and never for long."""

import pytest

from ares.engine.role_state import RoleState
from ares.protocol import messages
from ares.protocol.messages import ROLES, Role


def load(running: int, waiting: int = 0, prefilling: int = 0) -> messages.Telemetry:
    return messages.Telemetry(1, 0, running, waiting, 0, 0.0, 0, 0, [], prefilling=prefilling)


def order(state: RoleState, role: Role, now: float = 0.0, deadline_s: float = 60.0) -> messages.RoleResult:
    return state.order(messages.ChangeRole(7, role, deadline_s), now)


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [
        ("decode", "prefill", load(1)),
        ("decode", "prefill", load(0, waiting=1)),
        ("both", "prefill", load(3, prefilling=2)),
        ("prefill", "decode", load(1, prefilling=1)),
        ("both", "decode", load(3, prefilling=1)),
    ],
)
def test_role_changes_when_the_excluded_work_has_ended(before: Role, after: Role, left: messages.Telemetry) -> None:
    state = RoleState(before, list(ROLES))
    assert order(state, after) == messages.RoleResult(7, before, after)
    reported = state.report(left, 10.0)
    assert (reported.role, reported.next_role, reported.role_left_s) == (before, after, 50.0)
    # The work that it keeps need not end.
    kept = load(2, prefilling=2 if after == "prefill" else 0)
    reported = state.report(kept, 20.0)
    assert (reported.role, reported.next_role, reported.role_left_s) == (after, None, 0.0)


@pytest.mark.parametrize("before", ["prefill", "decode"])
def test_nothing_has_to_end_for_the_role_both(before: Role) -> None:
    state = RoleState(before, list(ROLES))
    order(state, "both")
    assert state.report(load(2, 1, prefilling=1), 0.0).role == "both"


def test_role_is_kept_where_work_is_left_at_the_deadline() -> None:
    state = RoleState("decode", list(ROLES))
    order(state, "prefill", deadline_s=5.0)
    assert state.report(load(1), 5.0).next_role == "prefill"
    reported = state.report(load(1), 5.1)
    assert (reported.role, reported.next_role) == ("decode", None)
    assert order(state, "prefill").next_role == "prefill"


def test_second_change_is_refused_and_the_own_role_ends_the_first() -> None:
    state = RoleState("decode", list(ROLES))
    order(state, "prefill")
    answer = order(state, "both")
    assert (answer.next_role, answer.refused) == ("prefill", "it is about to become prefill")
    # The same again changes no deadline.
    assert order(state, "prefill", now=30.0).refused == ""
    assert state.report(load(1), 59.0).role_left_s == 1.0
    assert order(state, "decode") == messages.RoleResult(7, "decode")
    assert state.report(load(0), 0.0).role == "decode"


def test_roles_that_an_instance_cannot_have_are_refused() -> None:
    state = RoleState("prefill", ["prefill"])
    answer = order(state, "decode")
    assert (answer.role, answer.next_role, answer.refused) == ("prefill", None, "it keeps the role prefill")
