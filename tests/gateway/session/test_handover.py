"""The states of a hand-over: what may follow what, who is told, and that its end is one."""

import asyncio
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ares.gateway.pool.delta import EngineLostError
from ares.gateway.session.handover import (
    TRANSITIONS,
    Handover,
    HandoverError,
    HandoverState,
    MigrationRecord,
)
from ares.gateway.session.segment import Segment
from ares.protocol.messages import CutResult

PAGE = Path(__file__).parents[3] / "docs" / "migration.md"
OUTCOMES = tuple(state for state in HandoverState if state not in TRANSITIONS)


class Stream:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def segment(base: int = 0) -> Any:
    instance: Any = SimpleNamespace(name="instance")
    stream: Any = Stream()
    return Segment(instance, "key", base, stream)


def cut(output_tokens: int = 8, tail: tuple[int, ...] = (6, 7, 8)) -> CutResult:
    return CutResult(1, "key", "pinned", output_tokens, list(tail), {"how": "to pull"})


def begun(*steps: str, base: int = 0) -> Handover:
    """Return a hand-over that has gone so far."""
    record = MigrationRecord("request", "source", "target", "test")
    handover = Handover(segment(base), segment().instance, record)
    for step in steps:
        match step:
            case "cut":
                handover.note_cut(cut())
            case "ask":
                handover.ask()
            case "accept":
                handover.accept(segment())
            case "refuse":
                handover.refuse(EngineLostError("dead"))
    return handover


def drawn() -> set[tuple[str, str]]:
    """Return the arrows of the picture, those that leave any state spelt out."""
    picture = PAGE.read_text().split("```mermaid")[1].split("```")[0]
    arrows = {(a, b) for a, b in re.findall(r"^ +(\S+) --> ([^\s:]+)", picture, re.MULTILINE) if a != "[*]"}
    final = {a for a, b in arrows if b == "[*]"}
    states = {state for arrow in arrows for state in arrow} - {"[*]", "any"}
    assert states == {state.value for state in HandoverState}
    ways = {(a, b) for a, b in arrows if b != "[*]"}
    return {(a, b) for a, b in ways if a != "any"} | {(a, b) for a in states - final for c, b in ways if c == "any"}


def test_the_picture_is_the_table() -> None:
    assert drawn() == {(a.value, b.value) for a, following in TRANSITIONS.items() for b in following}


def test_every_state_is_reached_and_leads_to_an_end() -> None:
    reached, edge = {HandoverState.CUTTING}, {HandoverState.CUTTING}
    while edge:
        edge = {after for state in edge for after in TRANSITIONS.get(state, ())} - reached
        reached |= edge
    assert reached == set(HandoverState)


@pytest.mark.parametrize(
    "steps",
    [
        ("ask",),
        ("accept",),
        ("refuse",),
        ("cut", "cut"),
        ("cut", "accept"),
        ("cut", "refuse"),
        ("cut", "ask", "cut"),
        ("cut", "ask", "ask"),
        ("cut", "ask", "accept", "accept"),
        ("cut", "ask", "accept", "refuse"),
        ("cut", "ask", "refuse", "accept"),
    ],
)
def test_steps_out_of_order_raise_and_change_nothing(steps: tuple[str, ...]) -> None:
    handover = begun(*steps[:-1])
    before = (handover.state, handover.segment, handover.cut)
    with pytest.raises(RuntimeError, match="does not go from"):
        {
            "cut": lambda: handover.note_cut(cut()),
            "ask": handover.ask,
            "accept": lambda: handover.accept(segment()),
            "refuse": lambda: handover.refuse(EngineLostError("dead")),
        }[steps[-1]]()
    assert (handover.state, handover.segment, handover.cut) == before


@pytest.mark.parametrize("steps", [(), ("cut",), ("cut", "ask"), ("cut", "ask", "refuse")])
def test_it_has_not_moved_before_the_target_has_accepted(steps: tuple[str, ...]) -> None:
    handover = begun(*steps)
    with pytest.raises(RuntimeError):
        handover.end(HandoverState.MOVED)
    assert handover.record.outcome == "moving"


@pytest.mark.parametrize(("first", "second"), list(itertools.product(["moved", "returned", "cancelled"], OUTCOMES)))
def test_it_ends_once(first: str, second: HandoverState) -> None:
    handover = begun("cut", "ask", "accept")
    handover.end(HandoverState(first))
    handover.end(second)
    assert handover.record.outcome == first


@pytest.mark.parametrize("outcome", ["moved", "returned", "cancelled", "finished_first"])
def test_what_nobody_takes_is_aborted(outcome: str) -> None:
    handover = begun("cut", "ask", "accept")
    started: Any = handover.segment
    handover.end(HandoverState(outcome))
    assert started.stream.closed == (outcome != "moved")


def test_a_target_that_accepts_too_late_is_not_taken() -> None:
    handover = begun("cut", "ask")
    handover.end(HandoverState.RETURNED)
    assert not handover.accept(segment())
    handover.refuse(EngineLostError("dead"))
    assert handover.record.outcome == "returned"
    assert handover.record.accept_s is None


@pytest.mark.parametrize(
    ("base", "emitted", "missing"),
    [(0, 8, []), (0, 7, [8]), (0, 5, [6, 7, 8]), (0, 4, None), (10, 16, [7, 8]), (0, 9, [])],
)
def test_the_tokens_that_the_stream_has_not_brought(base: int, emitted: int, missing: list[int] | None) -> None:
    assert begun(base=base).missing(emitted) is None
    assert begun("cut", base=base).missing(emitted) == missing


async def test_whoever_waits_is_told() -> None:
    handover = begun()
    waits = [asyncio.create_task(handover.until_cut()), asyncio.create_task(handover.until_source_relayed())]
    accepted, ended = asyncio.create_task(handover.until_accepted()), asyncio.create_task(handover.until_ended())
    await asyncio.sleep(0)
    handover.note_cut(cut())
    await asyncio.wait_for(waits[0], 60)
    assert not waits[1].done()
    handover.note_source_relayed()
    await asyncio.wait_for(waits[1], 60)
    handover.ask()
    started = segment()
    handover.accept(started)
    assert await asyncio.wait_for(accepted, 60) is started
    assert not ended.done()
    handover.end(HandoverState.MOVED)
    await asyncio.wait_for(ended, 60)


async def test_whoever_waits_is_told_of_the_end() -> None:
    handover = begun()
    cutting, accepting = asyncio.create_task(handover.until_cut()), asyncio.create_task(handover.until_accepted())
    relaying = asyncio.create_task(handover.until_source_relayed())
    await asyncio.sleep(0)
    handover.end(HandoverState.CANCELLED)
    for waiting in (cutting, accepting):
        with pytest.raises(HandoverError, match="cancelled"):
            await asyncio.wait_for(waiting, 60)
    await asyncio.wait_for(relaying, 60)


async def test_the_reason_of_a_refusal_is_told() -> None:
    handover = begun("cut", "ask")
    accepting = asyncio.create_task(handover.until_accepted())
    await asyncio.sleep(0)
    handover.refuse(EngineLostError("dead"))
    with pytest.raises(EngineLostError, match="dead"):
        await asyncio.wait_for(accepting, 60)


async def test_what_is_known_stays_known_after_the_end() -> None:
    """Both happen before the waiting task runs."""
    handover = begun()
    cutting = asyncio.create_task(handover.until_cut())
    await asyncio.sleep(0)
    handover.note_cut(cut())
    handover.end(HandoverState.CANCELLED)
    await asyncio.wait_for(cutting, 60)
