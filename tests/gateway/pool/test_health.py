"""The state of an instance: what is logged of it, and how much."""

import asyncio
import logging
from collections.abc import Callable

import pytest

from ares.gateway.pool import health
from ares.gateway.pool.health import Health, State

Lines = Callable[[], list[str]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    caplog.set_level(logging.INFO, "ares.gateway.pool.instance")
    return lambda: [f"{line.levelname} {line.getMessage()}" for line in caplog.records]


async def test_a_change_is_logged_once_with_its_cause(lines: Lines) -> None:
    one = Health()
    for _ in range(3):
        one.turn("d0", State.UNREACHABLE, "connection refused")
    one.turn("d0", State.UNREACHABLE, "no answer")  # the same state by another cause: the status shows it
    assert one.why == "cannot be reached: no answer"
    for _ in range(3):
        one.turn("d0", State.READY)
    assert one.why == ""
    one.turn("d0", State.LOST, "connection refused")
    one.turn("d0", State.READY)
    assert lines() == [
        "WARNING d0 cannot be reached: connection refused",
        "INFO d0 is ready",
        "WARNING d0 is lost: connection refused",
        "INFO d0 is ready again",
    ]


async def test_one_that_comes_and_goes_does_not_flood_the_log(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_SECONDS_A_LINE", 0.3)
    one = Health()
    for _ in range(500):
        one.turn("d0", State.READY)
        one.turn("d0", State.LOST, "connection refused")
    one.turn("d0", State.READY)
    assert len(lines()) == 10
    await asyncio.sleep(0.5)
    # The newest state, once, and how much was left out.
    assert lines()[10:] == ["INFO d0 is ready again (990 changes were not logged)"]
    one.close()


async def test_nothing_is_logged_of_one_that_is_closed(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_SECONDS_A_LINE", 0.05)
    one = Health()
    for _ in range(20):
        one.turn("d0", State.READY)
        one.turn("d0", State.LOST)
    one.close()
    await asyncio.sleep(0.2)
    assert len(lines()) == 10


def test_which_may_come_back_by_themselves() -> None:
    alone = {State.NOT_AN_INSTANCE, State.KEY_REFUSED, State.OTHER_MODEL, State.DUPLICATE}
    for state in State:
        one = Health()
        one.state = state
        assert not one.may_return, "it has never been ready"
        one.served = True
        assert one.may_return == (state not in alone)
