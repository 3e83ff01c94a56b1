"""The plan's time stands still while it is held, for whoever waits for a moment of it."""

import asyncio
import time

from ares_dev.chaos.clock import Clock


async def test_time_stands_still_while_it_is_held() -> None:
    clock = Clock()
    with clock.held():
        before = clock.now()
        await asyncio.sleep(0.1)
        assert clock.now() == before
    assert before <= clock.now() < before + 0.05


async def test_a_moment_comes_later_by_as_long_as_it_was_held() -> None:
    clock = Clock()
    began = time.monotonic()
    waiting = asyncio.create_task(clock.reach(0.1))
    with clock.held():
        await asyncio.sleep(0.1)
        with clock.held():  # two at a time
            await asyncio.sleep(0.1)
        assert not waiting.done()
    await waiting
    assert time.monotonic() - began >= 0.3


async def test_a_moment_that_has_passed_waits_for_the_clock_all_the_same() -> None:
    clock = Clock()
    await asyncio.sleep(0.02)
    with clock.held():
        late = asyncio.create_task(clock.reach(0.01))
        await asyncio.sleep(0.05)
        assert not late.done()
    await asyncio.wait_for(late, 1.0)
