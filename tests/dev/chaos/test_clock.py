"""The plan's time is stopped for every task that waits for it."""

import asyncio
import time

from ares_dev.chaos.clock import Clock


async def test_a_stopped_clock_shows_one_time() -> None:
    clock = Clock()
    with clock.stopped():
        before = clock.now()
        await asyncio.sleep(0.1)
        assert clock.now() == before
    assert before <= clock.now() < before + 0.05


async def test_a_time_comes_later_by_as_long_as_the_clock_was_stopped() -> None:
    clock = Clock()
    began = time.monotonic()
    waiting = asyncio.create_task(clock.reach(0.1))
    with clock.stopped():
        await asyncio.sleep(0.1)
        with clock.stopped():  # two at a time
            await asyncio.sleep(0.1)
        assert not waiting.done()
    await waiting
    assert time.monotonic() - began >= 0.3


async def test_a_time_that_has_passed_waits_for_a_stopped_clock() -> None:
    clock = Clock()
    await asyncio.sleep(0.02)
    with clock.stopped():
        late = asyncio.create_task(clock.reach(0.01))
        await asyncio.sleep(0.05)
        assert not late.done()
    await asyncio.wait_for(late, 1.0)
