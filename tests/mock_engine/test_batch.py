"""Continuous batching: step time, order, memory. No clock."""

import random
from typing import Any, cast

import pytest

from ares.mock_engine.batch import Batch, Policy, Step
from ares.mock_engine.http import Connection
from ares.mock_engine.request import Request
from ares.simulator.profile import StepTimeModel
from tests.mock_engine.cluster import PROFILE

LAW = StepTimeModel(
    base_s=1.0, per_request_s=0.1, per_resident_token_s=0.001, per_prefill_token_s=0.01, per_prefill_context_s=1e-5
)


class Bench:
    """A batch without a clock: `step` computes one step and gives every sampler its token."""

    def __init__(self, blocks: int = 100, policy: Policy = "fcfs", **changes: Any) -> None:
        self.pulling: list[Request] = []
        profile = PROFILE.model_copy(update={"step": LAW, **changes})
        self.batch = Batch(profile, blocks, policy, self.pulling.append)
        self.arrivals = 0

    def add(self, tokens: int, priority: int = 0, source: dict[str, Any] | None = None) -> Request:
        self.arrivals += 1
        request = Request(
            id=str(self.arrivals),
            key=None,
            prompt=[1] * tokens,
            generated=0,
            hash=0,
            prompt_hash=0,
            end=1 << 30,
            natural_end=1 << 30,
            connection=cast(Connection, None),
            priority=priority,
            arrival=self.arrivals,
            source=source,
        )
        self.batch.add(request)
        return request

    def step(self) -> Step:
        step = self.batch.schedule()
        assert step is not None
        self.batch.complete(step)
        for request in step.samplers:
            request.output.append(1)
            request.length += 1
        self.check()
        return step

    def check(self) -> None:
        """No block is lost, and what is computed has exactly the blocks that it needs."""
        batch = self.batch
        everybody = [*batch.running, *batch.waiting, *batch.loading, *batch.ready]
        assert batch.free + sum(request.blocks for request in everybody) == batch.total
        assert batch.free >= 0
        assert all(request.blocks * batch.size >= request.computed for request in everybody)
        assert all(request.blocks == 0 for request in batch.waiting)


def test_a_step_takes_what_the_law_says() -> None:
    bench = Bench(max_num_batched_tokens=64)
    bench.add(100)
    first = bench.step()
    assert first.samplers == []
    assert first.seconds == pytest.approx(1.0 + 0.01 * 64 + 1e-5 * 64 * 32)
    second = bench.step()
    assert second.seconds == pytest.approx(1.0 + 0.01 * 36 + 1e-5 * 36 * (64 + 18))
    assert len(second.samplers) == 1
    assert bench.step().seconds == pytest.approx(1.0 + 0.1 + 0.001 * 101)
    assert bench.step().seconds == pytest.approx(1.0 + 0.1 + 0.001 * 102)


def test_decoding_goes_before_new_prompts_within_the_token_budget() -> None:
    bench = Bench(max_num_batched_tokens=64)
    short, long = bench.add(10), bench.add(100)
    assert [(r, r.computed) for r in bench.step().scheduled] == [(short, 10), (long, 54)]
    step = bench.step()
    assert step.samplers == [short, long]
    assert long.computed == 100


def test_no_more_run_than_may() -> None:
    bench = Bench(max_num_seqs=2)
    requests = [bench.add(5) for _ in range(3)]
    bench.step()
    assert bench.batch.running == requests[:2]
    assert bench.batch.remove(requests[0]) == 1
    bench.batch.free += 1
    bench.step()
    assert bench.batch.running == requests[1:]


def test_the_whole_prompt_must_fit_before_its_first_chunk_runs() -> None:
    bench = Bench(blocks=10, max_num_batched_tokens=16)
    first, second = bench.add(64), bench.add(128)
    for _ in range(6):
        bench.step()
    assert second.state == "waiting"
    bench.batch.free += bench.batch.remove(first)
    bench.step()
    assert second.state == "running"


@pytest.mark.parametrize(("policy", "victim"), [("fcfs", 2), ("priority", 1)])
def test_who_gives_way(policy: Policy, victim: int) -> None:
    bench = Bench(blocks=6, policy=policy)
    requests = [bench.add(32, priority=7 if n == 1 else 3) for n in range(3)]
    while not bench.batch.preemptions:
        bench.step()
    assert [r.preemptions for r in requests] == [int(n == victim) for n in range(3)]
    assert bench.batch.waiting == [requests[victim]]
    assert requests[victim].computed == 0
    output = len(requests[victim].output)
    bench.batch.free += bench.batch.remove(requests[0])
    step = bench.step()
    # All of it is computed again, output too, and it goes on where it was.
    assert requests[victim] in step.samplers
    assert len(requests[victim].output) == output + 1


def test_smaller_priorities_are_served_first_and_equal_ones_in_order() -> None:
    bench = Bench(policy="priority", max_num_seqs=1)
    low, first, second = bench.add(5, priority=9), bench.add(5, priority=-1), bench.add(5, priority=-1)
    order = []
    for _ in range(3):
        request = bench.step().scheduled[0]
        order.append(request)
        bench.batch.free += bench.batch.remove(request)
    assert order == [first, second, low]


def test_kv_that_was_pulled_is_not_computed_again() -> None:
    bench = Bench()
    request = bench.add(65, source={"remote_engine_id": "x"})
    assert bench.batch.schedule() is None
    assert (bench.pulling, request.state, request.blocks) == ([request], "loading", 5)
    request.source = None
    bench.batch.loaded(request, 64)
    step = bench.step()
    assert step.samplers == [request]
    assert step.seconds == pytest.approx(1.0 + 0.1 + 0.001 * 65)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("seed", range(20))
def test_everybody_ends_and_no_block_is_lost(seed: int, policy: Policy) -> None:
    draw = random.Random(seed)
    bench = Bench(blocks=40, policy=policy, max_num_seqs=6, max_num_batched_tokens=48)
    left = {
        bench.add(draw.randint(1, 200), draw.randint(-3, 3), {} if draw.random() < 0.3 else None): draw.randint(1, 300)
        for _ in range(25)
    }
    steps = 0
    while left:
        steps += 1
        assert steps < 50_000
        step = bench.batch.schedule()
        for request in bench.pulling:
            request.source = None
            bench.batch.loaded(request, draw.choice([0, request.length - 1]))
        bench.pulling.clear()
        if step is None:
            continue
        bench.batch.complete(step)
        for request in step.samplers:
            request.output.append(1)
            request.length += 1
            if len(request.output) == left[request]:
                del left[request]
                bench.batch.free += bench.batch.remove(request)
        bench.check()
    assert bench.batch.free == bench.batch.total
    assert bench.batch.preemptions > 0
