"""Which requests are recorded."""

import heapq
import random

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

from ares.engine.prediction.recording_sample import AtOnce, FixedShare  # noqa: E402 - it needs vLLM's package

NAMES = [f"gateway/{n}" for n in range(2000)]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_fixed_share_is_the_same_on_every_instance() -> None:
    one, other = FixedShare(0.1), FixedShare(0.1)
    taken = [name for name in NAMES if one.takes(name)]
    assert 150 < len(taken) < 250
    assert taken == [name for name in NAMES if other.takes(name)]
    assert all(FixedShare(1.0).takes(name) for name in NAMES)
    assert not any(FixedShare(0.0).takes(name) for name in NAMES)


def chosen(places: int, running: int, seed: int) -> tuple[set[str], int]:
    """Let requests come and end at random, so many running on average; return those recorded, and the most at once."""
    generator, sample = random.Random(seed), AtOnce(places)
    taken: set[str] = set()
    ends: list[float] = []
    now, most = 0.0, 0
    for name in NAMES:
        now += generator.expovariate(running)
        while ends and ends[0] <= now:
            heapq.heappop(ends)
            sample.release(prefill_only=False)
        if sample.takes(name):
            taken.add(name)
            heapq.heappush(ends, now + generator.expovariate(1.0))
        most = max(most, len(ends))
    return taken, most


def test_few_requests_are_all_recorded() -> None:
    assert chosen(16, 4, 0)[0] == set(NAMES)


@pytest.mark.parametrize("running", [40, 160, 640])
def test_of_many_as_many_are_recorded_as_there_are_places(running: int) -> None:
    taken, most = chosen(16, running, 0)
    assert most == 16
    assert 0.5 * 16 / running < len(taken) / len(NAMES) < 1.3 * 16 / running


@pytest.mark.parametrize(("load", "other_load"), [(160, 160), (160, 80), (40, 40)])
def test_instances_of_about_the_same_load_choose_the_same_requests(load: int, other_load: int) -> None:
    one, other = chosen(16, load, 1)[0], chosen(16, other_load, 2)[0]
    assert len(one & other) > 0.75 * min(len(one), len(other))


def test_it_soon_takes_all_again_when_the_load_has_gone() -> None:
    sample = AtOnce(4)
    assert sum(sample.takes(name) for name in NAMES) == 4
    for _ in range(4):
        sample.release(prefill_only=False)
    late = 0
    for name in NAMES[:100]:
        if sample.takes(name):
            sample.release(prefill_only=False)
            late += 1
    assert late > 40


def test_the_place_of_a_request_that_was_only_prefilled_stays_taken() -> None:
    clock = Clock()
    sample = AtOnce(2, clock)
    for name in NAMES[:2]:
        assert sample.takes(name)
        sample.release(prefill_only=True)
    assert not sample.takes(NAMES[2])
    clock.now = 31.0
    assert sample.takes(NAMES[2])
