"""The counts of an address, between real processes."""

import asyncio
import multiprocessing
import os
from collections.abc import Callable

import pytest

from ares.gateway.processes.shared_counts import Placed, SharedCounts

URL, OTHER = "http://a:1", "http://b:1"


@pytest.fixture
def counts() -> SharedCounts:
    made = SharedCounts(2, 3, ["off", "ares"])
    made.begin(0, 0)
    return made


def in_process(work: Callable[[], None]) -> None:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(20)
    assert process.exitcode == 0


def test_a_process_reads_what_another_has_counted(counts: SharedCounts) -> None:
    def sibling() -> None:
        counts.begin(1, 1)
        counts.set_backlog(4, 90)
        counts.set_streams(2, 7)
        counts.set_placed({URL: (64, 10)})
        counts.add_placed(URL, 16, 5)
        counts.preset = "ares"
        assert counts.other_backlogs() == (1, 2)

    counts.set_backlog(1, 2)
    in_process(sibling)
    assert counts.other_backlogs() == (4, 90)
    assert [counts.other_streams(key) for key in range(3)] == [0, 0, 7]
    assert list(counts.placed_by_others(URL)) == [Placed(f"{counts.address_name}-1", 80, 15)]
    assert list(counts.placed_by_others(OTHER)) == list(counts.placed_by_others("http://unknown")) == []
    assert counts.preset == "ares"


def test_instances_come_and_go(counts: SharedCounts) -> None:
    # More than there is room for at a time.
    urls = [f"http://{n}:1" for n in range(6000)]
    name = f"{counts.address_name}-1"

    def place(*pairs: tuple[str, tuple[int, int]]) -> Callable[[], None]:
        def sibling() -> None:
            counts.begin(1, 1)
            for first in range(0, len(urls), 100):
                counts.set_placed(dict.fromkeys(urls[first : first + 100], (1, 1)))
            for url, (tokens, growth) in pairs:
                counts.add_placed(url, tokens, growth)

        return sibling

    in_process(place((URL, (5, 1)), (OTHER, (7, 2)), (URL, (1, 0))))
    assert list(counts.placed_by_others(URL)) == [Placed(name, 6, 1)]
    assert list(counts.placed_by_others(OTHER)) == [Placed(name, 7, 2)]
    assert list(counts.placed_by_others(urls[-1])) == [Placed(name, 1, 1)]
    assert not list(counts.placed_by_others(urls[0]))
    # The one that is started in its place finds them in another order.
    in_process(place((OTHER, (9, 2)), (URL, (8, 1))))
    assert list(counts.placed_by_others(URL)) == [Placed(name, 8, 1)]
    assert list(counts.placed_by_others(OTHER)) == [Placed(name, 9, 2)]


def test_without_room_for_a_further_instance_the_log_says_so(
    counts: SharedCounts, caplog: pytest.LogCaptureFixture
) -> None:
    counts.set_placed({f"http://{n}:1": (1, 1) for n in range(4096)})
    assert not caplog.records
    for _ in range(2):
        counts.add_placed(URL, 1, 1)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["more than 4096 instances"]
    counts.set_placed({URL: (1, 1)})
    assert len(caplog.records) == 1


def test_a_process_that_ended_counts_nothing_and_has_another_name_when_it_starts_again(counts: SharedCounts) -> None:
    def sibling() -> None:
        counts.begin(1, 1)
        counts.set_backlog(4, 90)

    in_process(sibling)
    counts.count_restart(1)
    counts.clear(1)
    assert counts.other_backlogs() == (0, 0)
    in_process(lambda: counts.begin(1, 2))
    assert [counts.gateway_of(process) for process in (0, 1)] == [f"{counts.address_name}-{n}" for n in (0, 2)]
    assert counts.restarts == [0, 1]


def test_a_single_process_has_no_siblings() -> None:
    alone = SharedCounts()
    alone.set_backlog(4, 90)
    assert (alone.gateway, alone.others, alone.other_backlogs()) == (alone.address_name, [], (0, 0))


async def test_one_process_at_a_time_has_the_turn_and_a_dead_one_does_not_keep_it(counts: SharedCounts) -> None:
    here, there = multiprocessing.get_context("fork").Pipe()

    def sibling() -> None:
        async def hold() -> None:
            async with counts.turn(5):
                there.send("held")
                await asyncio.sleep(60)

        asyncio.run(hold())

    process = multiprocessing.get_context("fork").Process(target=sibling)
    process.start()
    assert await asyncio.to_thread(here.recv) == "held"
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with counts.turn(0.05):  # it may be stopped: it is not waited for any longer
        assert loop.time() - began >= 0.05
    waiting = asyncio.create_task(_take(counts))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    assert process.pid is not None
    os.kill(process.pid, 9)
    await asyncio.wait_for(waiting, 60)
    process.join()


async def _take(counts: SharedCounts) -> None:
    async with counts.turn(30):
        pass


def test_another_model_has_counts_of_its_own_at_the_same_processes(counts: SharedCounts) -> None:
    other = counts.of_another_model()

    def sibling() -> None:
        counts.begin(1, 1)
        counts.set_waiting(3)
        other.set_waiting(2)
        other.set_backlog(4, 90)

    in_process(sibling)
    assert (counts.waiting_elsewhere, other.waiting_elsewhere) == (3, 2)
    assert (counts.other_backlogs(), other.other_backlogs()) == ((0, 0), (4, 90))
    assert other.gateway_of(1) == counts.gateway_of(1) == f"{counts.address_name}-1"
    counts.clear(1)
    assert (counts.waiting_elsewhere, other.waiting_elsewhere) == (0, 0)
