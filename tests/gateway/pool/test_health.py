"""The status of an instance: what is logged of it, and how much."""

import asyncio
import logging
from collections.abc import Callable

import pytest

from ares.gateway.pool.health import Health, Status
from ares.gateway.tuning import Tuning

Lines = Callable[[], list[str]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    caplog.set_level(logging.INFO, "ares.gateway.pool.instance")
    return lambda: [f"{line.levelname} {line.getMessage()}" for line in caplog.records]


async def test_a_change_is_logged_once_with_its_cause(lines: Lines) -> None:
    one = Health()
    for _ in range(3):
        one.set_status("d0", Status.UNREACHABLE, "connection refused")
    one.set_status("d0", Status.UNREACHABLE, "no answer")  # the same status for another reason: the status shows it
    assert one.why == "cannot be reached: no answer"
    for _ in range(3):
        one.set_status("d0", Status.READY)
    assert one.why == ""
    one.set_status("d0", Status.LOST, "connection refused")
    one.set_status("d0", Status.READY)
    assert lines() == [
        "WARNING d0 cannot be reached: connection refused",
        "INFO d0 is ready",
        "WARNING d0 is lost: connection refused",
        "INFO d0 is ready again",
    ]


async def test_one_that_comes_and_goes_does_not_flood_the_log(lines: Lines) -> None:
    one = Health(tuning=Tuning(health_log_line_s=0.3))
    for _ in range(500):
        one.set_status("d0", Status.READY)
        one.set_status("d0", Status.LOST, "connection refused")
    one.set_status("d0", Status.READY)
    assert len(lines()) == 10
    await asyncio.sleep(0.5)
    # The newest state, once, and how much was left out.
    assert lines()[10:] == ["INFO d0 is ready again (990 changes were not logged)"]
    one.close()


async def test_nothing_is_logged_of_one_that_is_closed(lines: Lines) -> None:
    one = Health(tuning=Tuning(health_log_line_s=0.05))
    for _ in range(20):
        one.set_status("d0", Status.READY)
        one.set_status("d0", Status.LOST)
    one.close()
    await asyncio.sleep(0.2)
    assert len(lines()) == 10


def test_which_may_come_back_by_themselves() -> None:
    alone = {Status.NOT_AN_INSTANCE, Status.KEY_REFUSED, Status.OTHER_MODEL, Status.WRONG_ADDRESS, Status.DUPLICATE}
    for status in Status:
        one = Health()
        one.status = status
        assert not one.may_return, "it has never been ready"
        one.served = True
        assert one.may_return == (status not in alone)
