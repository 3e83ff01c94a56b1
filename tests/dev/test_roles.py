"""The traffic of the roles command, what it reads of changes, and what it compares."""

from typing import Any

import pytest
import typer

from ares.bench.live.client import Observed
from ares_dev import roles
from ares_dev.roles import Traffic


def test_two_kinds_of_traffic_take_turns() -> None:
    kinds = (Traffic(300, 8, 2.0), Traffic(20, 100, 4.0))
    made = roles.phases(kinds, 3, 30.0, 1)
    assert made == roles.phases(kinds, 3, 30.0, 1)
    assert len(made) == 3
    for number, (requests, kind) in enumerate(zip(made, (*kinds, kinds[0]), strict=True)):
        assert 0.5 * kind.rate * 30 < len(requests) < 1.5 * kind.rate * 30
        assert all(30 * number <= one.at_s < 30 * (number + 1) for one in requests)
        assert {(len(one.body["prompt"]), one.body["max_tokens"]) for one in requests} == {(kind.prompt, kind.output)}
    names = [one.name for requests in made for one in requests]
    assert len(set(names)) == len(names)


def change(state: str, instance: str, at: float) -> dict[str, Any]:
    return {"state": state, "instance": instance, "at": at, "why": f"why {state}"}


def test_changes_since_the_start_and_when_they_were_done() -> None:
    seen = [
        change("planned decode", "a", 90.0),
        change("role decode", "a", 99.0),
        change("planned prefill", "b", 103.0),
        change("ready", "b", 104.0),
        change("role prefill", "b", 105.5),
        change("planned decode", "b", 120.0),
    ]
    assert roles.changes_since(seen, 100.0) == [
        {"at_s": 3.0, "instance": "b", "to": "prefill", "reason": "why planned prefill", "had_it_s": 5.5},
        {"at_s": 20.0, "instance": "b", "to": "decode", "reason": "why planned decode", "had_it_s": None},
    ]


def test_a_request_that_failed_meets_no_objective() -> None:
    def seen(first_s: float, last_s: float, error: str | None = None) -> Observed:
        return Observed("x", 10.0, [1, 2, 3], 5, first_s, last_s, 0.0, error)

    found = roles.figures([seen(11, 11.2), seen(15, 15.2), seen(11, 13), seen(11, 11.2, "lost")], (4.0, 0.15))
    assert (found["requests"], found["objectives_met"], found["share_met"]) == (4, 1, 0.25)
    assert found["ttft_s"]["p50"] == pytest.approx(1.0)


def test_tokens_are_compared_with_those_of_the_first_run() -> None:
    runs: list[dict[str, Any]] = [{}, {}]
    roles.compare(runs, [{"a": [1], "b": [2]}, {"a": [1], "b": [3], "c": [4]}])
    assert [one["with_other_tokens"] for one in runs] == [[], ["b"]]


@pytest.mark.parametrize(("text", "why"), [("1+2,3+0", "3\\+0"), ("planned,1+2", "must be fixed")])
def test_what_cannot_be_compared_is_refused(text: str, why: str) -> None:
    with pytest.raises(typer.BadParameter, match=why):
        roles.ways_of(text)
