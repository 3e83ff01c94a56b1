"""One sequence over fake instances: every token once and in order, whatever happens between."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ares.gateway import engine, entering
from ares.gateway.engine import Delta, EngineLostError, EngineRefusedError
from ares.gateway.entering import Entering
from ares.gateway.instances import Instance, NoInstanceError, Pool
from ares.gateway.migration import Migration, NotMovableError
from ares.gateway.patience import Patience
from ares.gateway.sampling import Sampling
from ares.gateway.sequence import Sequence
from tests.gateway.conftest import VOCABULARY
from tests.gateway.fakes import EOS, FakeInstance, eventually, expected, instances

PROMPT = [10, 20, 30, 40, 50]


class Bench:
    """A pool over fakes, and the placement of its sequences: the first open instance that may be used."""

    def __init__(self, fakes: list[FakeInstance], pool: Pool) -> None:
        self.fakes = {fake.name: fake for fake in fakes}
        self.pool = pool
        self.order = [fake.name for fake in fakes if fake.role != "prefill"]
        self.full = False

    def prefill(self) -> Instance | None:
        return next((i for i in self.pool.instances if i.role == "prefill" and i.open), None)

    async def admit(self, sequence: Entering, exclude: set[str]) -> Instance:
        for _ in range(15):
            usable = {i.name: i for i in self.pool.decode() if i.open and i.name not in exclude}
            chosen = next((usable[name] for name in self.order if name in usable), None)
            if chosen is not None and not self.full:
                return chosen
            await asyncio.sleep(0.2)
        raise NoInstanceError("no decode instance is ready")

    def instance(self, name: str) -> Instance:
        found = self.pool.find(name)
        assert found is not None
        return found

    async def quiet(self) -> None:
        """Wait until no fake generates or pins anything."""
        for fake in self.fakes.values():
            await fake.until(lambda fake=fake: fake.quiet)


class Run:
    """A sequence that runs, and what it gave out."""

    def __init__(self, bench: Bench, sampling: Sampling, prompt: list[int], timeout_s: float) -> None:
        self.sequence = Sequence("request", prompt, sampling, bench, timeout_s)
        self.bench = bench
        self.tokens: list[int] = []
        self.deltas: list[Delta] = []
        self.stop_after: int | None = None
        self._changed = asyncio.Condition()
        self.task = asyncio.create_task(self.sequence.run(self._emit))

    async def _emit(self, batch: list[Delta]) -> bool:
        async with self._changed:
            for delta in batch:
                self.deltas.append(delta)
                self.tokens += delta.token_ids or []
            self._changed.notify_all()
        return self.stop_after is not None and len(self.tokens) >= self.stop_after

    async def reached(self, count: int) -> None:
        async with asyncio.timeout(5), self._changed:
            await self._changed.wait_for(lambda: len(self.tokens) >= count)

    async def move(self, target: str) -> Migration:
        """Move; a source that outruns the order, on a busy machine, is held back before it is finished."""
        source = self.where if self.sequence.instance is not None else None
        if source is not None and source.hold_at is None:
            source.hold_at = self.sequence.tokens + 20
        else:
            source = None
        try:
            async with asyncio.timeout(5):
                return await self.sequence.migrate(self.bench.instance(target), "test")
        finally:
            if source is not None:
                source.hold_at = None

    async def finish(self) -> list[int]:
        async with asyncio.timeout(10):
            await self.task
        assert self.tokens == self.sequence.emitted
        return self.tokens

    async def leave(self) -> None:
        """Leave as a client does."""
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task

    @property
    def where(self) -> FakeInstance:
        assert self.sequence.instance is not None
        return self.bench.fakes[self.sequence.instance.name]

    @property
    def finish_reasons(self) -> list[str]:
        return [delta.finish_reason for delta in self.deltas if delta.finish_reason is not None]


Start = Callable[..., Run]


async def acquaint(fakes: list[FakeInstance]) -> tuple[Pool, Any]:
    http = engine.session()
    pool = Pool([fake.url for fake in fakes], http, 0.02)
    pool.start()
    await eventually(lambda: all(i.healthy and i.hello for i in pool.instances), 15)
    return pool, http


@pytest.fixture
async def bench(fakes: list[FakeInstance], impatient: None) -> AsyncIterator[Bench]:
    pool, http = await acquaint(fakes)
    yield Bench(fakes, pool)
    await pool.stop()
    await http.close()


@pytest.fixture
async def start(bench: Bench) -> AsyncIterator[Start]:
    runs: list[Run] = []

    def begin(
        maximum: int = 60,
        *,
        prompt: list[int] = PROMPT,
        timeout_s: float = 1.0,
        pinned: str | None = None,
        **parameters: Any,
    ) -> Run:
        runs.append(Run(bench, Sampling(parameters, maximum, 0, pinned), prompt, timeout_s))
        return runs[-1]

    yield begin
    for run in runs:
        run.task.cancel()
    await asyncio.gather(*(run.task for run in runs), return_exceptions=True)


def undisturbed(count: int, prompt: list[int] = PROMPT, eos_at: int | None = None) -> list[int]:
    return expected(prompt, count, vocabulary=VOCABULARY, eos_at=eos_at)


def hold(bench: Bench, output: int) -> None:
    """Let no decode instance generate further than so many output tokens."""
    for fake in bench.fakes.values():
        fake.hold_at = len(PROMPT) + output


def let_go(bench: Bench) -> None:
    for fake in bench.fakes.values():
        fake.hold_at = None


# --- without moves ---


async def test_prefill_gives_the_first_token_and_decode_the_rest(bench: Bench, start: Start) -> None:
    run = start(40, temperature=0.5)
    assert await run.finish() == undisturbed(40)
    assert run.finish_reasons == ["length"]
    prefill, decode = bench.fakes["prefill-0"], bench.fakes["decode-0"]
    assert prefill.asked[0]["sampling_params"]["max_tokens"] == 1
    assert prefill.asked[0]["sampling_params"]["temperature"] == 0.5
    assert decode.asked[0]["token_ids"] == PROMPT + undisturbed(1)
    assert decode.asked[0]["sampling_params"]["max_tokens"] == 39
    assert decode.pulled == [f"{run.sequence.gateway}/{run.sequence._nonce}/2"]
    assert prefill.freed == [prefill.asked[0]["kv_transfer_params"]["ares_key"]]
    await bench.quiet()


async def test_one_token_needs_no_decode_instance(bench: Bench, start: Start) -> None:
    run = start(1)
    assert await run.finish() == undisturbed(1)
    assert run.finish_reasons == ["length"]
    assert bench.fakes["decode-0"].asked == bench.fakes["decode-1"].asked == []
    assert "do_remote_decode" not in bench.fakes["prefill-0"].asked[0]["kv_transfer_params"]
    await bench.quiet()


async def test_end_of_sequence_as_the_first_token(bench: Bench, start: Start) -> None:
    bench.fakes["prefill-0"].eos_at = len(PROMPT)
    run = start(10)
    assert await run.finish() == [EOS]
    assert run.finish_reasons == ["stop"]
    assert bench.fakes["decode-0"].asked == []
    await bench.quiet()


async def test_end_of_sequence_while_decoding(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].eos_at = len(PROMPT) + 7
    run = start(50)
    assert await run.finish() == undisturbed(50, eos_at=len(PROMPT) + 7)
    assert run.finish_reasons == ["stop"]


async def test_a_client_that_has_enough_ends_the_generation(bench: Bench, start: Start) -> None:
    run = start(2000)
    run.stop_after = 5
    await run.finish()
    assert run.tokens[:5] == undisturbed(5)
    await bench.quiet()
    assert len(bench.fakes["decode-0"].aborted) == 1


async def test_minimum_tokens_count_over_all_instances(bench: Bench, start: Start) -> None:
    run = Run(bench, Sampling({}, 40, 30), PROMPT, 1.0)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "moved"
    await run.finish()
    asked = [bench.fakes[name].asked[0] for name in ("prefill-0", "decode-0", "decode-1")]
    minimums = [body["sampling_params"]["min_tokens"] for body in asked]
    moved_at = len(asked[2]["token_ids"]) - len(PROMPT)
    assert minimums == [1, 29, max(0, 30 - moved_at)]


# --- moves ---


async def test_one_move(bench: Bench, start: Start) -> None:
    run = start(80)
    await run.reached(10)
    record = await run.move("decode-1")
    assert record.outcome == "moved"
    assert (record.source, record.target) == ("decode-0", "decode-1")
    assert record.stall_s is not None
    assert record.stall_s > 0
    assert run.where.name == "decode-1"
    assert await run.finish() == undisturbed(80)
    assert run.finish_reasons == ["length"]
    assert run.sequence.moves == 1
    # All but the newest token's KV was pulled.
    assert record.pulled_tokens == len(bench.fakes["decode-1"].asked[0]["token_ids"]) - 1
    await bench.quiet()


async def test_many_moves_back_and_forth(bench: Bench, start: Start) -> None:
    run = start(400)
    for count in range(8):
        await run.reached(10 * (count + 1))
        record = await run.move(f"decode-{(count + 1) % 2}")
        assert record.outcome == "moved"
    assert await run.finish() == undisturbed(400)
    assert run.sequence.moves == 8
    await bench.quiet()


async def test_the_target_starts_before_the_stream_has_brought_the_tail(bench: Bench, start: Start) -> None:
    """The usual case on real engines: the hand-over overtakes the stream."""
    bench.fakes["decode-0"].faults.tail_after_s = 0.1
    run = start(80)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "moved"
    assert await run.finish() == undisturbed(80)
    await bench.quiet()


async def test_the_stream_ends_before_the_hand_over_is_known(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.handover_after_s = 0.1
    run = start(80)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "moved"
    assert await run.finish() == undisturbed(80)
    await bench.quiet()


@pytest.mark.parametrize("in_time", [True, False])
async def test_a_client_that_reads_slowly_loses_nothing_in_a_move(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, *, in_time: bool
) -> None:
    """More tokens than a `Handover` repeats wait for the client at the cut, or until the lease has ended."""
    gate = asyncio.Event()

    async def slow(batch: list[Delta]) -> bool:
        if len(slow_tokens) > 5:
            await gate.wait()
        slow_tokens.extend(token for delta in batch for token in delta.token_ids or [])
        return False

    slow_tokens: list[int] = []
    slow_run = Sequence("slow", PROMPT, Sampling({}, 300), bench, 5.0)
    task = asyncio.create_task(slow_run.run(slow))
    fake = bench.fakes["decode-0"]
    await fake.until(lambda: any(len(work.output) > 120 for work in fake.running.values()))
    move = asyncio.create_task(slow_run.migrate(bench.instance("decode-1"), "test"))
    await fake.until(lambda: bool(fake.pinned))
    key = next(iter(fake.pinned))
    if not in_time:
        monkeypatch.setattr(entering, "HELD_S", 0.0)
    gate.set()
    assert (await asyncio.wait_for(move, 5)).outcome == "moved"
    await asyncio.wait_for(task, 5)
    assert slow_tokens == undisturbed(300)
    # What may be somebody else's by now is not pulled.
    assert (key in fake.released) is not in_time
    assert bool(bench.fakes["decode-1"].pulled) is in_time
    await bench.quiet()


async def test_a_failed_pull_costs_a_recomputation_only(bench: Bench, start: Start) -> None:
    bench.fakes["decode-1"].faults.fail_pull = True
    run = start(60)
    await run.reached(10)
    record = await run.move("decode-1")
    assert (record.outcome, record.pulled_tokens) == ("moved", 0)
    assert await run.finish() == undisturbed(60)


async def test_logprobs_of_every_token_come_once(bench: Bench, start: Start) -> None:
    run = start(60, logprobs=0)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "moved"
    await run.finish()
    content = [p.token_id for delta in run.deltas if delta.logprobs for p in delta.logprobs.content or []]
    assert content == undisturbed(60)


async def test_where_it_is_while_it_moves(bench: Bench, start: Start) -> None:
    bench.fakes["decode-1"].faults.answer_after_s = 0.1
    run = start(60)
    await run.reached(5)
    assert run.sequence.not_movable() is None
    move = asyncio.create_task(run.move("decode-1"))
    await bench.fakes["decode-1"].until(lambda: bool(bench.fakes["decode-1"].asked))
    assert run.sequence.incoming is bench.instance("decode-1")
    assert run.sequence.instance is bench.instance("decode-0")
    assert run.sequence.not_movable() in {"moving", "not_decoding"}
    with pytest.raises(NotMovableError):
        await run.sequence.migrate(bench.instance("decode-1"), "twice")
    assert (await move).outcome == "moved"
    assert run.sequence.incoming is None
    await run.finish()
    assert run.sequence.not_movable() == "finished"
    with pytest.raises(NotMovableError):
        await run.move("decode-0")


# --- what is never moved ---


async def test_a_pinned_sequence_takes_the_classic_path(bench: Bench, start: Start) -> None:
    run = start(30, pinned="seed", seed=7)
    await run.reached(5)
    assert run.sequence.not_movable() == "seed"
    with pytest.raises(NotMovableError) as refusal:
        await run.move("decode-1")
    assert refusal.value.reason == "seed"
    assert await run.finish() == undisturbed(30)
    prefill, decode = bench.fakes["prefill-0"], bench.fakes["decode-0"]
    # The state of the generator starts where it is used: no token of the prefill instance reaches the client.
    assert "seed" not in prefill.asked[0]["sampling_params"]
    assert decode.asked[0]["token_ids"] == PROMPT
    assert decode.asked[0]["sampling_params"]["seed"] == 7
    assert decode.asked[0]["sampling_params"]["max_tokens"] == 30
    assert bench.fakes["decode-0"].cuts == []
    await bench.quiet()


async def test_a_pinned_sequence_whose_instance_dies_fails_visibly(bench: Bench, start: Start) -> None:
    run = start(200, pinned="seed", seed=7)
    await run.reached(5)
    await bench.fakes["decode-0"].die()
    with pytest.raises(EngineLostError, match="seed"):
        await run.finish()


async def test_a_sequence_before_its_first_decoded_token_is_not_moved(bench: Bench, start: Start) -> None:
    bench.fakes["prefill-0"].faults.answer_after_s = 0.2
    run = start(10)
    await bench.fakes["prefill-0"].until(lambda: bool(bench.fakes["prefill-0"].asked))
    assert run.sequence.not_movable() == "not_decoding"
    with pytest.raises(NotMovableError):
        await run.move("decode-1")
    assert await run.finish() == undisturbed(10)


# --- the end, or the client's leave, in the hand-over ---


async def test_end_of_sequence_in_the_step_of_the_cut(bench: Bench, start: Start) -> None:
    eos_at = len(PROMPT) + 10
    hold(bench, 10)
    bench.fakes["decode-0"].eos_at = eos_at
    run = start(60)
    await run.reached(10)
    record = await run.move("decode-1")  # the cut lets the held engine make one more step
    assert record.outcome == "finished_first"
    assert await run.finish() == undisturbed(60, eos_at=eos_at)
    assert run.finish_reasons == ["stop"]
    assert bench.fakes["decode-1"].asked == []
    await bench.quiet()


async def test_its_own_limit_in_the_step_of_the_cut(bench: Bench, start: Start) -> None:
    hold(bench, 10)
    run = start(11)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "finished_first"
    assert await run.finish() == undisturbed(11)
    assert run.finish_reasons == ["length"]
    await bench.quiet()


async def test_end_of_sequence_as_the_first_token_of_the_target(bench: Bench, start: Start) -> None:
    hold(bench, 10)
    eos_at = len(PROMPT) + 11
    for fake in bench.fakes.values():
        fake.eos_at = eos_at
    run = start(60)
    await run.reached(10)
    bench.fakes["decode-1"].hold_at = None
    assert (await run.move("decode-1")).outcome == "moved"
    assert await run.finish() == undisturbed(60, eos_at=eos_at)
    await bench.quiet()


async def test_a_stop_string_in_the_tail_of_the_source(bench: Bench, start: Start) -> None:
    """The target runs already when the gateway finds that the output is complete."""
    hold(bench, 10)
    bench.fakes["decode-0"].faults.tail_after_s = 0.1
    run = start(60)
    run.stop_after = 11
    await run.reached(10)
    bench.fakes["decode-1"].hold_at = None
    assert (await run.move("decode-1")).outcome == "finished_first"
    assert await run.finish() == undisturbed(11)
    await bench.quiet()


@pytest.mark.parametrize("moment", ["cut", "handover", "arrival", "arrived"])
async def test_a_client_that_leaves_in_a_hand_over(bench: Bench, start: Start, moment: str) -> None:
    source, target = bench.fakes["decode-0"], bench.fakes["decode-1"]
    source.faults.handover_after_s = 0.1 if moment == "handover" else 0.0
    source.faults.deaf = moment == "cut"
    target.faults.answer_after_s = 0.1 if moment == "arrival" else 0.0
    target.faults.silent_stream = moment == "arrived"
    run = start(2000)
    await run.reached(10)
    move = asyncio.create_task(run.move("decode-1"))
    if moment == "cut":
        await eventually(lambda: run.sequence.moving)
    elif moment == "handover":
        await source.until(lambda: bool(source.pinned))
    else:
        await target.until(lambda: bool(target.asked))
    if moment == "arrived":
        await target.until(lambda: bool(target.running))
    await run.leave()
    source.faults.deaf = False
    assert (await move).outcome in {"cancelled", "finished_first"}
    await bench.quiet()
    if moment == "arrival":
        # The target may be pulling already: a source that frees the KV, and goes to sleep, pulls it from under it.
        assert source.released == []
    given = len(run.tokens)
    assert run.tokens == undisturbed(given)


async def test_a_client_that_leaves_between_prefill_and_decode(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.answer_after_s = 5
    run = start(50)
    await bench.fakes["decode-0"].until(lambda: bool(bench.fakes["decode-0"].asked))
    prefill = bench.fakes["prefill-0"]
    assert len(prefill.pinned) == 1
    key = next(iter(prefill.pinned))
    await run.leave()
    await prefill.until(lambda: key in prefill.released)
    await bench.quiet()


async def test_a_client_that_leaves_in_the_prefill(bench: Bench, start: Start) -> None:
    prefill = bench.fakes["prefill-0"]
    prefill.faults.silent_stream = True
    run = start(50)
    await prefill.until(lambda: bool(prefill.running))
    await run.leave()
    await prefill.until(lambda: len(prefill.aborted) == 1)
    await bench.quiet()


# --- the target fails ---


async def goes_on_at_the_source(bench: Bench, run: Run, outcome: str = "returned") -> None:
    record = await run.move("decode-1")
    assert record.outcome == outcome
    await run.reached(len(run.tokens) + 1)
    assert run.where.name == "decode-0"
    maximum = run.sequence.sampling.maximum_tokens
    assert await run.finish() == undisturbed(maximum)
    await bench.quiet()


@pytest.mark.parametrize("status", [400, 429, 500, 503])
async def test_a_target_that_refuses(bench: Bench, start: Start, status: int) -> None:
    bench.fakes["decode-1"].faults.refuse = status
    run = start(150)
    await run.reached(10)
    await goes_on_at_the_source(bench, run)


async def test_a_target_that_is_dead(bench: Bench, start: Start) -> None:
    run = start(150)
    await run.reached(10)
    await bench.fakes["decode-1"].die()
    await goes_on_at_the_source(bench, run)


async def test_a_target_that_hangs_before_it_answers(bench: Bench, start: Start) -> None:
    bench.fakes["decode-1"].faults.hang = True
    run = start(600, timeout_s=0.3)
    await run.reached(10)
    began = asyncio.get_running_loop().time()
    await goes_on_at_the_source(bench, run)
    assert asyncio.get_running_loop().time() - began < 4


async def test_a_target_that_hangs_stalls_the_client_for_one_timeout(bench: Bench, start: Start) -> None:
    bench.fakes["decode-1"].faults.hang = True
    run = start(600, timeout_s=0.5)
    await run.reached(10)
    move = asyncio.create_task(run.move("decode-1"))
    source = bench.fakes["decode-0"]
    await source.until(lambda: bool(source.pinned))
    began = asyncio.get_running_loop().time()
    await run.reached(len(run.tokens) + 3)
    assert asyncio.get_running_loop().time() - began < 0.9
    assert (await move).outcome == "returned"


async def test_a_target_that_never_sends_a_token(bench: Bench, start: Start) -> None:
    bench.fakes["decode-1"].faults.silent_stream = True
    run = start(150, timeout_s=0.3)
    await run.reached(10)
    await goes_on_at_the_source(bench, run)
    assert len(bench.fakes["decode-1"].aborted) == 1


async def test_a_target_that_dies_before_its_first_token(bench: Bench, start: Start) -> None:
    target = bench.fakes["decode-1"]
    target.faults.silent_stream = True
    run = start(150, timeout_s=5)
    await run.reached(10)
    move = asyncio.create_task(run.move("decode-1"))
    await target.until(lambda: bool(target.running))
    await target.die()
    assert (await move).outcome == "returned"
    assert await run.finish() == undisturbed(150)
    await bench.quiet()


async def test_a_target_that_fails_the_request_in_its_stream(bench: Bench, start: Start) -> None:
    bench.fakes["decode-1"].faults.error_in_stream = 500
    run = start(100)
    await run.reached(10)
    record = await run.move("decode-1")
    assert record.outcome in {"moved", "returned"}  # the error may come with the first token
    assert await run.finish() == undisturbed(100)
    await bench.quiet()


async def test_more_failed_moves_than_a_request_has_attempts(bench: Bench, start: Start) -> None:
    """A policy that insists on a bad target costs moves, never the request."""
    bench.fakes["decode-1"].faults.refuse = 503
    run = start(600)
    for count in range(6):
        await run.reached(10 * (count + 1))
        await eventually(lambda: run.sequence.not_movable() is None)
        assert (await run.move("decode-1")).outcome == "returned"
    assert await run.finish() == undisturbed(600)


async def test_failed_moves_leave_no_trace_in_the_target(bench: Bench, start: Start) -> None:
    bench.fakes["decode-1"].faults.silent_stream = True
    run = start(150, timeout_s=0.2)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "returned"
    await run.finish()
    assert bench.instance("decode-1")._admissions == {}
    assert bench.instance("decode-0")._answers == {}


# --- the source fails ---


async def test_a_source_that_dies_while_it_decodes(bench: Bench, start: Start) -> None:
    run = start(100)
    await run.reached(10)
    await bench.fakes["decode-0"].die()
    assert await run.finish() == undisturbed(100)
    assert run.where.name == "decode-1"
    await bench.quiet()


async def test_a_stream_that_breaks_on_a_living_instance(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.break_after = 10
    run = start(60)
    assert await run.finish() == undisturbed(60)
    await bench.quiet()


@pytest.mark.parametrize(("most", "survives"), [(2, False), (20, True)])
async def test_it_survives_so_many_losses(bench: Bench, start: Start, most: int, survives: bool) -> None:
    decoding = [fake for fake in bench.fakes.values() if fake.role == "decode"]
    for fake in decoding:
        fake.faults.break_after = 10  # 60 tokens: half a dozen losses
    run = start(60)
    run.sequence.maximum_attempts = most
    if survives:
        assert await run.finish() == undisturbed(60)
    else:
        with pytest.raises(EngineLostError):
            await run.finish()
        assert sum(len(fake.asked) for fake in decoding) == 1 + most
        assert run.tokens == undisturbed(60)[: len(run.tokens)]
    await bench.quiet()


async def test_an_instance_that_aborts_what_it_runs(bench: Bench, start: Start) -> None:
    run = start(100)
    await run.reached(10)
    bench.fakes["decode-0"].faults.abort = True
    await run.reached(20)
    assert await run.finish() == undisturbed(100)


async def test_an_engine_error_in_the_stream(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.error_in_stream = 500
    run = start(40)
    assert await run.finish() == undisturbed(40)


async def test_a_request_that_the_engine_refuses_in_its_stream(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.error_in_stream = 400
    run = start(40)
    with pytest.raises(EngineRefusedError):
        await run.finish()
    await bench.quiet()


@pytest.mark.parametrize("parameters", [{}, {"logprobs": 0}], ids=["plain", "logprobs"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_source_that_breaks_off_after_the_cut(
    bench: Bench, start: Start, when: str, parameters: dict[str, Any]
) -> None:
    """Before or after the target has taken over: each token once, one owner, nothing left behind."""
    source, target = bench.fakes["decode-0"], bench.fakes["decode-1"]
    source.faults.break_at_cut = True
    if when == "after":
        source.faults.tail_after_s = 0.2
    else:
        target.faults.answer_after_s = 0.2
    run = start(150, **parameters)
    await run.reached(10)
    record = await run.move("decode-1")
    assert record.outcome in {"moved", "returned"}
    if when == "after" and not parameters:
        assert record.outcome == "moved"
    assert await run.finish() == undisturbed(150)
    await bench.quiet()
    if parameters:
        content = [p.token_id for delta in run.deltas if delta.logprobs for p in delta.logprobs.content or []]
        assert content == undisturbed(150)


async def test_a_source_that_breaks_off_with_more_than_a_handover_repeats(bench: Bench) -> None:
    """The client reads slowly: of the tokens in flight only the last are known when the stream breaks."""
    source = bench.fakes["decode-0"]
    source.faults.break_at_cut = True
    gate, tokens = asyncio.Event(), list[int]()

    async def slow(batch: list[Delta]) -> bool:
        if len(tokens) > 5:
            await gate.wait()
        tokens.extend(token for delta in batch for token in delta.token_ids or [])
        return False

    sequence = Sequence("slow", PROMPT, Sampling({}, 250), bench, 2.0)
    task = asyncio.create_task(sequence.run(slow))
    await source.until(lambda: any(len(work.output) > 120 for work in source.running.values()))
    move = asyncio.create_task(sequence.migrate(bench.instance("decode-1"), "test"))
    await source.until(lambda: bool(source.pinned))
    await asyncio.sleep(0.05)  # the reset arrives while the client blocks
    gate.set()
    assert (await asyncio.wait_for(move, 5)).outcome in {"moved", "returned"}
    await asyncio.wait_for(task, 5)
    assert tokens == undisturbed(250)
    await bench.quiet()


async def test_a_stop_string_in_the_tail_of_a_source_that_breaks_off(bench: Bench, start: Start) -> None:
    """The token that completes the output is known from the hand-over only."""
    hold(bench, 10)
    bench.fakes["decode-0"].faults.break_at_cut = True
    bench.fakes["decode-0"].faults.tail_after_s = 0.1
    run = start(60)
    run.stop_after = 11
    await run.reached(10)
    bench.fakes["decode-1"].hold_at = None
    assert (await run.move("decode-1")).outcome == "finished_first"
    assert await run.finish() == undisturbed(11)
    await bench.quiet()


async def test_a_source_and_a_target_that_both_fail(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.break_at_cut = True
    bench.fakes["decode-1"].faults.refuse = 500
    run = start(100)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "returned"
    assert await run.finish() == undisturbed(100)
    await bench.quiet()


async def test_a_source_that_is_preempted_or_waits(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.not_running = True
    run = start(60)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "not_running"
    assert run.sequence.not_movable() in {None, "finished"}
    assert await run.finish() == undisturbed(60)
    assert bench.fakes["decode-1"].asked == []


async def test_a_lost_handover(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.lose_handover = True
    run = start(100, timeout_s=0.3)
    await run.reached(10)
    record = await run.move("decode-1")
    assert record.outcome in {"source_silent", "returned"}
    assert await run.finish() == undisturbed(100)
    await bench.quiet()


async def test_a_handover_after_the_timeout(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.handover_after_s = 0.5
    run = start(100, timeout_s=0.2)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "source_silent"
    assert await run.finish() == undisturbed(100)
    await bench.quiet()


async def test_a_source_that_does_not_hear_the_cut(bench: Bench, start: Start) -> None:
    source = bench.fakes["decode-0"]
    source.faults.deaf = True
    run = start(200, timeout_s=0.1)
    await run.reached(10)
    assert (await run.move("decode-1")).outcome == "source_silent"
    source.faults.deaf = False  # it hears the cut now, when nobody waits for its answer
    assert await run.finish() == undisturbed(200)
    await bench.quiet()


async def test_a_cut_without_a_taker_does_not_blame_the_instance(bench: Bench, start: Start) -> None:
    """A late cut on the only living decode instance must not leave the request without one."""
    source = bench.fakes["decode-0"]
    run = start(200, timeout_s=0.1)
    await run.reached(10)
    source.faults.deaf = True
    assert (await run.move("decode-1")).outcome == "source_silent"
    await bench.fakes["decode-1"].die()
    await eventually(lambda: not bench.instance("decode-1").healthy)
    source.faults.deaf = False
    assert await run.finish() == undisturbed(200)


# --- nobody is there, or some are not ---


async def test_a_prefill_instance_that_dies_is_done_without(bench: Bench, start: Start) -> None:
    await bench.fakes["prefill-0"].die()
    run = start(30)
    assert await run.finish() == undisturbed(30)


async def test_a_prefill_connection_that_breaks_leaves_nothing_pinned(bench: Bench, start: Start) -> None:
    """The instance lives on: it must learn that nobody wants this prompt."""
    prefill = bench.fakes["prefill-0"]
    prefill.faults.silent_stream = True
    run = start(30)
    await prefill.until(lambda: bool(prefill.running))
    key = next(iter(prefill.running))
    prefill.reset_connections()
    prefill.faults.silent_stream = False
    assert await run.finish() == undisturbed(30)
    await prefill.until(lambda: key in prefill.released)
    await bench.quiet()


@pytest.mark.parametrize("status", [500, 503])
async def test_an_instance_that_fails_at_the_door_is_not_the_last_word(bench: Bench, start: Start, status: int) -> None:
    bench.fakes["prefill-0"].faults.refuse = status
    bench.fakes["decode-0"].faults.refuse = status
    run = start(30)
    assert await run.finish() == undisturbed(30)
    await bench.quiet()


async def test_a_request_that_the_engine_refuses(bench: Bench, start: Start) -> None:
    bench.fakes["decode-0"].faults.refuse = 400
    run = start(30)
    with pytest.raises(EngineRefusedError, match="decode-0 refuses"):
        await run.finish()
    await bench.quiet()


async def test_no_decode_instance(bench: Bench, start: Start) -> None:
    bench.order = []
    run = start(30)
    with pytest.raises(NoInstanceError):
        await run.finish()
    await bench.quiet()


async def test_all_decode_instances_die(bench: Bench, start: Start) -> None:
    run = start(300)
    await run.reached(5)
    await bench.fakes["decode-1"].die()
    await bench.fakes["decode-0"].die()
    with pytest.raises((EngineLostError, NoInstanceError)):
        await run.finish()


async def test_an_output_that_is_lost_again_and_again_says_so(bench: Bench, start: Start) -> None:
    for name in bench.order:
        bench.fakes[name].faults.break_after = 2
    run = start(60)
    with pytest.raises(EngineLostError, match="lost 4 times, the last time: the stream broke"):
        await run.finish()
    assert run.tokens == undisturbed(60)[: len(run.tokens)]
    await bench.quiet()


async def test_instances_that_all_refuse_are_counted(bench: Bench, start: Start) -> None:
    for name in bench.order:
        bench.fakes[name].faults.refuse = 503
    run = start(60)
    with pytest.raises(EngineLostError, match="2 instances in turn did not take it, the last one: decode-1 refuses"):
        await run.finish()
    await bench.quiet()


async def test_telemetry_that_says_loading_costs_no_stream_that_runs(bench: Bench, start: Start) -> None:
    hold(bench, 20)
    run = start(60, pinned="seed")
    await run.reached(10)
    run.sequence.supervise(1e6)
    let_go(bench)
    assert await run.finish() == undisturbed(60)


async def test_silent_telemetry_alone_is_no_reason_to_stop_waiting() -> None:
    patience, instance = Patience(), SimpleNamespace(frozen=True)
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def work() -> int:
        return await answer

    waiting = asyncio.create_task(patience.answer(instance, work()))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    patience.give_up_if_frozen()
    answer.set_result(7)
    assert await waiting == 7


async def test_without_prefill_instances(impatient: None) -> None:
    async with instances("both", "both", vocabulary=VOCABULARY) as fakes:
        pool, http = await acquaint(fakes)
        bench = Bench(fakes, pool)
        run = Run(bench, Sampling({}, 60), PROMPT, 1.0)
        await run.reached(10)
        assert (await run.move("both-1")).outcome == "moved"
        assert await run.finish() == undisturbed(60)
        await bench.quiet()
        await pool.stop()
        await http.close()
