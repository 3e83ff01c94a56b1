"""The plan: a function of its seed, and one that leaves enough instances alone."""

import msgspec
import pytest

from ares_dev.chaos.plan import Event, Plan, Shape, make_plan
from tests.dev.chaos.shapes import MOCK, REAL


@pytest.mark.parametrize("shape", [MOCK, REAL])
def test_a_seed_makes_one_plan(shape: Shape) -> None:
    plan = make_plan(5, shape)
    assert plan == make_plan(5, shape)
    assert plan != make_plan(6, shape)
    assert [plan.request(3, turn) for turn in range(20)] == [make_plan(5, shape).request(3, turn) for turn in range(20)]
    assert plan.request(3, 0) != make_plan(6, shape).request(3, 0)
    assert plan.token_ids(7) != make_plan(6, shape).token_ids(7)


def test_a_plan_can_be_kept_and_played_again() -> None:
    plan = make_plan(1, MOCK)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_names_are_those_of_the_cluster() -> None:
    shape = msgspec.structs.replace(MOCK, decode=6)
    assert shape.processes("decode") == ["decode-0", "decode-1"]
    assert shape.instances("decode-1") == ["decode-1-0", "decode-1-1"]
    assert REAL.processes("decode") == ["decode-0", "decode-1"]
    assert REAL.instances("decode-1") == ["decode-1"]


def ill(event: Event, shape: Shape) -> str:
    """The process that an event makes ill."""
    return event.target.rsplit("-", 1)[0] if shape.simulated and event.kind not in ("kill", "pause") else event.target


@pytest.mark.parametrize("shape", [MOCK, REAL])
@pytest.mark.parametrize("seed", range(20))
def test_at_least_half_of_the_decode_processes_are_well(shape: Shape, seed: int) -> None:
    blows = [
        event for event in make_plan(seed, shape).events if not event.harmless and event.target.startswith("decode")
    ]
    most = len(shape.processes("decode")) // 2
    for event in blows:
        others = {ill(other, shape) for other in blows if other.at_s <= event.at_s < other.at_s + other.seconds}
        assert len(others) <= most


def test_everything_happens() -> None:
    events = make_plan(0, MOCK).events
    assert {event.kind for event in events} == {"move", "kill", "pause", "drain", "role", "preset", "fault"}
    said = " ".join(event.what for event in events)
    for word in ("nan", "negative", "huge", "constant", "empty", "full", "absurd", "silent", "refuse", "drop_streams"):
        assert word in said
    for word in ("slow", "freeze_s", "die", "pre_copy", "stop_and_copy", "auto"):
        assert word in said
    assert [event.at_s for event in events] == sorted(event.at_s for event in events)
    assert all(0 < event.at_s < MOCK.seconds for event in events)


def test_a_short_run_on_real_engines_lies_and_kills() -> None:
    shape = msgspec.structs.replace(REAL, seconds=25.0, events_per_s=0.8)
    killed = 0
    for seed in range(20):
        first, *others = [event for event in make_plan(seed, shape).events if event.kind != "move"]
        assert first.what in ('{"telemetry":"silent"}', '{"telemetry":"absurd"}')
        killed += any(event.kind == "kill" and event.target.startswith("decode") for event in others)
    assert killed >= 18


def test_what_only_simulated_engines_do_is_not_asked_of_real_ones() -> None:
    events = make_plan(0, msgspec.structs.replace(REAL, seconds=2000.0)).events
    said = {event.what for event in events if event.kind == "fault"}
    assert {word.split('"')[1] for word in said} == {"predictions", "telemetry"}
    assert len(said) == 8


def test_requests_differ() -> None:
    plan = make_plan(2, MOCK)
    asked = [plan.request(slot, turn) for slot in range(40) for turn in range(10)]
    assert {one.client for one in asked} == {"plain", "whole", "slow", "leaves"}
    assert {tuple(one.parameters) for one in asked} == {tuple(kind) for kind in plan.kinds}
    assert all(1 <= one.tokens <= 400 and 2 <= one.prompt_tokens <= 500 for one in asked)
    assert len({one.prompt for one in asked}) == len(asked)
    assert len(plan.token_ids(asked[0].prompt)) == asked[0].prompt_tokens
    assert len({make_plan(2, REAL).request(slot, 0).prompt for slot in range(40)}) <= 8
