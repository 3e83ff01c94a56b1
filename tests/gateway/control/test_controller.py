"""The live controller over fake instances: who is held, who gives way, who is rescued, and what a fault costs."""

import asyncio
import contextlib
import gzip
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.instance import NoInstanceError
from ares.gateway.records.replay import ReplayError, replay
from ares.gateway.service import COMMANDED, Gateway
from ares.gateway.session.objectives import Objective
from ares.gateway.tuning import DEFAULT, Tuning
from ares.mock_engine.request import Request
from ares.policy import Cluster, forecast
from ares.policy.admission import AdmissionDecision, Candidates, Progress
from tests.gateway.fakes import eventually, instances
from tests.gateway.running import IMPATIENT, VOCABULARY
from tests.gateway.test_service import Client, configuration, sample, started


def exactly(request: Request) -> tuple[float, float, float]:
    """A predictor that knows: every request here runs to its limit."""
    left = float(request.end - len(request.output))
    return left, left, left


@contextlib.asynccontextmanager
async def cluster(
    folder: Path, *, kv_blocks: int = 40, tuning: Tuning = DEFAULT, **settings: Any
) -> AsyncIterator[tuple[Gateway, Any]]:
    """One prefill and two decode instances of so many blocks of 16 tokens, under the preset `ares`."""
    async with instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes:
        for fake in fakes[1:]:
            fake.kv_blocks = kv_blocks
            fake.predicts = exactly
        for fake in fakes:
            await fake.die()
            await fake.start()
        gateway = Gateway(configuration(fakes, **({"preset": "ares", "period_s": 0.05} | settings)), folder, tuning)
        await started(gateway)
        yield gateway, fakes
        for fake in fakes:
            await fake.until(lambda fake=fake: fake.quiet)
        await gateway.stop()


def teach(gateway: Gateway, tokens: int) -> None:
    """Let the gateway believe that outputs have so many tokens."""
    for _ in range(100):
        gateway.controller.snapshots.lengths.add(tokens)


async def test_a_request_waits_until_it_fits_and_misses_nothing(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        teach(gateway, 400)
        for fake in fakes[1:]:
            fake.hold_at = 100
        clients = [Client(gateway, 400, name=f"r{n}", prompt=[10 + n] * 50) for n in range(3)]
        # 640 tokens hold one request of 450, and not two.
        await eventually(lambda: gateway.controller.waiting == 1 and [len(f.running) for f in fakes[1:]] == [1, 1], 30)
        waiting = next(client for client in clients if not client.tokens)
        for fake in fakes[1:]:
            fake.hold_at = None
        for client in clients:
            await client.finish()
            client.check(400)
        assert waiting.tokens
        assert gateway.controller.waiting == 0
        assert sample(gateway, "ares_admission_decisions_total", kind="admit") == 3


async def test_whoever_was_refused_waits_for_room_like_everybody(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        teach(gateway, 400)
        for fake in fakes[1:]:
            fake.hold_at = 100
        large = Client(gateway, 400, name="large", prompt=[10] * 50)
        await eventually(lambda: any(fake.running for fake in fakes[1:]))
        full, refusing = sorted(fakes[1:], key=lambda fake: not fake.running)
        refusing.faults.refuse = 503
        second = Client(gateway, 400, name="second", prompt=[11] * 50)
        # 640 tokens hold one request of 450, and not two: it is not sent after the first one.
        await eventually(lambda: gateway.controller.waiting == 1)
        await asyncio.sleep(0.3)
        assert len(full.running) == 1
        assert len(second.tokens) == 1  # of its prefill
        refusing.faults.refuse = None
        for fake in fakes[1:]:
            fake.hold_at = None
        for client in (large, second):
            await client.finish()
            client.check(400)


async def test_nobody_waits_for_a_decision_about_nobody(model_folder: Path) -> None:
    async with cluster(model_folder, tuning=Tuning(admission_shortest_s=30.0)) as (gateway, _):
        for _ in range(3):  # as after the ends of others
            gateway.controller.changed()
            await asyncio.sleep(0.02)
        client = Client(gateway, 20)
        await client.finish()
        client.check(20)


async def test_the_smallest_goes_first_unless_a_class_goes_before(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        teach(gateway, 550)
        for fake in fakes[1:]:
            fake.hold_at = 60
        running = [Client(gateway, 550, name=f"r{n}", prompt=[10 + n] * 50) for n in range(2)]
        await eventually(lambda: all(client.tokens for client in running), 30)
        order: list[str] = []

        def enter(name: str, prompt: int, rank: int) -> asyncio.Task[None]:
            async def emit(_: Any) -> bool:
                if name not in order:
                    order.append(name)
                return False

            work = gateway.generate(name, [7] * prompt, Sampling({}, 500), emit, Objective(rank=rank))
            return asyncio.create_task(work)

        waiting = [enter("large", 90, 0), enter("small", 20, 0), enter("background", 10, 1)]
        await eventually(lambda: gateway.controller.waiting == 3, 30)
        for fake in fakes[1:]:
            fake.hold_at = None
        for client in running:
            await client.finish()
        await asyncio.wait_for(asyncio.gather(*waiting), 20)
        assert order.index("background") == 2
        assert set(order[:2]) == {"small", "large"}


async def test_a_long_request_gives_way_and_loses_no_token(model_folder: Path) -> None:
    async with cluster(model_folder, slo_ttft_s=1.0, slo_tpot_s=0.1) as (gateway, fakes):
        teach(gateway, 500)
        long = [Client(gateway, 500, name=f"long-{n}", prompt=[10 + n] * 100) for n in range(2)]
        await eventually(lambda: all(len(client.tokens) > 100 for client in long), 20)
        await eventually(lambda: all(i.state.step_time.coefficients is not None for i in gateway.pool.decode()))
        for fake in fakes[1:]:
            fake.hold_at = 300  # they stay, and hold the memory
        short = Client(gateway, 60, name="short", prompt=[3] * 300)
        await eventually(lambda: gateway.controller.suspended > 0 or short.task.done(), 20)
        assert len(gateway.backlog) >= gateway.controller.suspended
        for fake in fakes[1:]:
            fake.hold_at = None
        for client, maximum in ((short, 60), (long[0], 500), (long[1], 500)):
            await client.finish()
            client.check(maximum)
        assert sample(gateway, "ares_admission_decisions_total", kind="suspend") >= 1
        assert sample(gateway, "ares_admission_decisions_total", kind="resume") >= 1


async def test_who_waits_long_still_fills_the_queue(model_folder: Path) -> None:
    async with cluster(model_folder, tuning=Tuning(pinned_kv_kept_s=0.1), maximum_waiting=2) as (gateway, fakes):
        teach(gateway, 400)
        for fake in fakes[1:]:
            fake.hold_at = 100
        clients = [Client(gateway, 400, name=f"r{n}", prompt=[10 + n] * 50) for n in range(4)]
        # Two decode; the others let their KV go, and wait as before: without a token, or a gap behind one.
        await eventually(lambda: len(fakes[0].released) == 2, 30)
        assert (len(gateway.backlog), gateway.controller.waiting, gateway.controller.suspended) == (2, 2, 0)
        assert sorted(len(client.tokens) for client in clients)[:2] == [0, 0]
        assert gateway.backlog.tokens >= 2 * 400
        with pytest.raises(NoInstanceError, match="2 requests wait already"):
            gateway.check_queue()
        for fake in fakes[1:]:
            fake.hold_at = None
        for client in clients:
            await client.finish()
            client.check(400)
        assert (len(gateway.backlog), gateway.backlog.tokens) == (0, 0)


async def test_before_memory_ends_a_request_is_moved(model_folder: Path) -> None:
    async with cluster(model_folder, preset="off") as (gateway, fakes):
        crowded = next(i for i in gateway.pool.decode())
        spare = next(i for i in gateway.pool.decode() if i is not crowded)
        spare.state.draining = True
        for fake in fakes[1:]:
            fake.hold_at = 290
        clients = [Client(gateway, 400, name=f"r{n}", prompt=[10 + n] * 50) for n in range(2)]
        await eventually(lambda: all(len(client.tokens) == 240 for client in clients), 20)
        spare.state.draining = False
        gateway.controller.use_preset("ares")
        await eventually(lambda: sample(gateway, "ares_oom_actions_total", how="moved") >= 1)
        for fake in fakes[1:]:
            fake.hold_at = None
        for client in clients:
            await client.finish()
            client.check(400)
        assert any(record.reason.startswith("out-of-memory avoidance: ") for record in gateway.migrations)


async def test_what_is_preempted_runs_again_where_there_is_room(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        for fake in fakes[1:]:
            fake.hold_at = 60
        client = Client(gateway, 200, name="r0", prompt=[3] * 30)
        await eventually(lambda: len(client.tokens) == 30, 20)
        full = next(fake for fake in fakes[1:] if fake.running)
        full.preempted |= set(full.running)
        for fake in fakes[1:]:
            fake.hold_at = None
        await client.finish()
        client.check(200)
        assert gateway.controller.suspensions == 1
        assert not gateway.migrations


async def test_a_static_preset_leaves_the_preempted_to_the_engine(model_folder: Path) -> None:
    async with cluster(model_folder, preset="ares-no-prediction") as (gateway, fakes):
        for fake in fakes[1:]:
            fake.hold_at = 60
        client = Client(gateway, 200, name="r0", prompt=[3] * 30)
        await eventually(lambda: len(client.tokens) == 30, 20)
        full = next(fake for fake in fakes[1:] if fake.running)
        full.preempted |= set(full.running)
        await eventually(lambda: bool(gateway.controller.snapshots.build(gateway.sessions.values()).preempted))
        view = gateway.controller.snapshots.build(gateway.sessions.values())
        assert view.cluster.resident_tokens.tolist() == [view.sessions[0].tokens]  # it takes them before all others
        full.preempted.clear()
        for fake in fakes[1:]:
            fake.hold_at = None
        await client.finish()
        client.check(200)
        assert gateway.controller.suspensions == 0


async def test_memory_is_forecast_in_blocks(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        for fake in fakes[1:]:
            fake.hold_at = 47
        client = Client(gateway, 200, name="r0", prompt=[3] * 30)
        await eventually(lambda: len(client.tokens) == 17, 20)
        # 47 tokens fill three blocks of 16, but for the next token; 48 would hold a fourth.
        await eventually(lambda: held_now(gateway) == 48)
        for fake in fakes[1:]:
            fake.hold_at = 48
        await eventually(lambda: held_now(gateway) == 64)
        for fake in fakes[1:]:
            fake.hold_at = None
        await client.finish()


def held_now(gateway: Gateway) -> float:
    cluster = gateway.controller.snapshots.build(gateway.sessions.values()).cluster
    return float(forecast(cluster, np.zeros(1, np.int64)).allocated.sum())


async def test_what_does_not_fit_anywhere_is_refused_in_time(model_folder: Path) -> None:
    async with cluster(model_folder, maximum_wait_s=0.3) as (gateway, fakes):
        teach(gateway, 500)
        for fake in fakes[1:]:
            fake.hold_at = 60
        running = [Client(gateway, 500, name=f"r{n}", prompt=[10 + n] * 50) for n in range(2)]
        await eventually(lambda: all(client.tokens for client in running), 30)
        third = Client(gateway, 500, name="third", prompt=[3] * 50)
        with pytest.raises(NoInstanceError, match=r"no room for 0\.3 s"):
            await third.task
        for fake in fakes[1:]:
            fake.hold_at = None
        for client in running:
            await client.finish()
            client.check(500)


@pytest.mark.parametrize("rest_s", [60.0, 0.0])
async def test_a_commanded_move_is_not_undone_for_a_while(model_folder: Path, tmp_path: Path, rest_s: float) -> None:
    settings = {"preset": "off", "cooldown_s": 0.0, "commanded_cooldown_s": rest_s, "decision_log": tmp_path / "log"}
    async with cluster(model_folder, kv_blocks=1000, **settings) as (gateway, fakes):
        for fake in fakes[1:]:
            fake.hold_at = 230
        ours = Client(gateway, 400, name="ours", prompt=[10] * 200)
        await eventually(lambda: len(ours.tokens) == 30, 30)
        # The other one stays where it is: only ours could even the load out.
        theirs = Client(gateway, 400, name="theirs", prompt=[11] * 200, unmovable_reason="test")
        await eventually(lambda: len(theirs.tokens) == 30, 30)
        sequence = gateway.sessions["ours"]
        target = gateway.sessions["theirs"].instance
        assert sequence.instance is not target
        for fake in fakes[1:]:
            fake.hold_at = 260
        assert (await gateway.migrate(sequence, target, COMMANDED, COMMANDED)).outcome == "moved"
        await eventually(lambda: len(ours.tokens) == 60, 30)
        gateway.controller.use_preset("ares-no-prediction")
        periods = sum_of(gateway, "kept", "moved")
        await eventually(lambda: sum_of(gateway, "kept", "moved") >= periods + 10, 30)
        view = gateway.controller.snapshots.build(gateway.sessions.values())
        if rest_s:
            assert sequence.instance is target
            assert view.cluster.commanded.tolist() == [name == "ours" for name in view.cluster.requests]
        else:
            await eventually(lambda: len(gateway.migrations) > 1, 30)
            assert view.cluster.commanded is None
        assert not view.cluster.movable.any() or not rest_s
        for fake in fakes[1:]:
            fake.hold_at = None
        for client in (ours, theirs):
            await client.finish()
            client.check(400)
    result = replay(tmp_path / "log", None)
    assert result.decisions == result.same > 0
    logged = [json.loads(line)["cluster"]["commanded"] for line in (tmp_path / "log").read_text().splitlines()]
    assert any(logged) == bool(rest_s)
    old = tmp_path / "old"
    old.write_text((tmp_path / "log").read_text().replace('"commanded":', '"placed":'))
    assert replay(old, None).same == result.same


def sum_of(gateway: Gateway, *results: str) -> float:
    return sum(sample(gateway, "ares_rebalance_decisions_total", result=result) for result in results)


# --- faults ---


async def test_who_is_held_does_not_enter_where_its_state_would_be_lost(model_folder: Path) -> None:
    async with cluster(model_folder, tuning=IMPATIENT) as (gateway, fakes):
        teach(gateway, 400)
        lacking, fit = fakes[1:]
        fit.carries = ("seed",)
        await fit.die()
        await fit.start()
        await eventually(lambda: any(i.state.hello and i.state.hello.carries for i in gateway.pool.instances))
        fit.hold_at = 100
        first = Client(gateway, 400, name="first", prompt=[10] * 50, needs=frozenset({"seed"}))
        await eventually(lambda: bool(fit.running))
        # There is room elsewhere, for others.
        second = Client(gateway, 400, name="second", prompt=[11] * 50, needs=frozenset({"seed"}))
        await eventually(lambda: gateway.controller.waiting == 1)
        other = Client(gateway, 60, name="other", prompt=[12] * 50)
        await other.finish()
        other.check(60)
        assert gateway.controller.waiting == 1
        fit.hold_at = None
        for client in (first, second):
            await client.finish()
            client.check(400)
        assert len(lacking.asked) == 1


async def test_an_entrance_that_throws_lets_everybody_in(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, _):

        def broken(cluster: Cluster, candidates: Candidates, running: Progress) -> list[AdmissionDecision]:
            raise RuntimeError("a bug in the policy")

        gateway.controller.admission_decider.policy.decide = broken  # type: ignore[method-assign]
        client = Client(gateway)
        await client.finish()
        client.check()
        assert sample(gateway, "ares_controller_faults_total", part="admission") >= 1


async def test_a_dispatch_that_throws_costs_no_request(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):

        def broken(*_: Any) -> Any:
            raise RuntimeError("a bug in the policy")

        # The door that is opened when the entrance fails is dispatch too.
        gateway.controller.admission_decider.policy.decide = broken  # type: ignore[method-assign]
        gateway.controller.dispatch_decider.policy.choose = broken  # type: ignore[method-assign]
        for fake in fakes[1:]:
            fake.hold_at = 30
        clients = [Client(gateway, 100, name=f"r{n}", prompt=[10 + n] * 20) for n in range(4)]
        for client in clients:
            await client.reached(5)
        assert [len(fake.running) for fake in fakes[1:]] == [2, 2]
        for fake in fakes[1:]:
            fake.hold_at = None
        for client in clients:
            await client.finish()
            client.check(100)
        assert sample(gateway, "ares_controller_faults_total", part="dispatch") >= 4


@pytest.mark.parametrize("nonsense", [(math.nan,) * 3, (-5.0, 1.0, 2.0), (9.0, 3.0, 1.0), (1.0, math.inf, math.inf)])
async def test_predictions_that_make_no_sense_are_counted_and_not_used(
    model_folder: Path, nonsense: tuple[float, float, float]
) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        for fake in fakes[1:]:
            fake.predicts = lambda _: nonsense
        clients = [Client(gateway, 200, name=f"r{n}", prompt=[10 + n] * 20) for n in range(4)]
        for client in clients:
            await client.finish()
            client.check(200)
        assert sample(gateway, "ares_implausible_predictions_total") > 0
        assert sample(gateway, "ares_controller_faults_total", part="rebalance") == 0


async def test_huge_predictions_end_at_the_limit(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        for fake in fakes[1:]:
            fake.predicts = lambda _: (1e300, 1e300, 1e300)
            fake.hold_at = 30
        client = Client(gateway, 100, prompt=[5] * 20)
        sequence = await client.reached(10)
        await eventually(lambda: sequence.predicted is not None or bool(gateway.pool))
        seen = gateway.controller.snapshots.build(gateway.sessions.values()).cluster.remaining_tokens
        assert seen is not None
        assert (seen <= 100).all()
        for fake in fakes[1:]:
            fake.hold_at = None
        await client.finish()
        client.check(100)


async def test_serving_goes_on_without_telemetry(model_folder: Path) -> None:
    async with cluster(model_folder, tuning=IMPATIENT) as (gateway, fakes):
        for fake in fakes:
            fake._channel._snapshot = lambda: 1 / 0
        await eventually(lambda: not any(i.health.healthy for i in gateway.pool.instances), 20)
        await eventually(lambda: any(i.health.reachable for i in gateway.pool.decode()), 20)
        client = Client(gateway)
        await client.finish()
        client.check()


# --- presets and the log ---


async def test_switching_to_open_admission_lets_those_in_who_wait(model_folder: Path) -> None:
    async with cluster(model_folder) as (gateway, fakes):
        teach(gateway, 500)
        for fake in fakes[1:]:
            fake.hold_at = 60
        clients = [Client(gateway, 500, name=f"r{n}", prompt=[10 + n] * 50) for n in range(3)]
        await eventually(lambda: gateway.controller.waiting == 1, 30)
        gateway.controller.use_preset("static-rr")
        await eventually(lambda: gateway.controller.waiting == 0, 30)
        for fake in fakes[1:]:
            fake.hold_at = None
        for client in clients:
            await client.finish()
            client.check(500)


async def test_the_log_decides_again(model_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    async with cluster(model_folder, decision_log=log, slo_ttft_s=1.0) as (gateway, _):
        teach(gateway, 300)
        clients = [Client(gateway, 100 + 60 * n, name=f"r{n}", prompt=[10 + n] * 60) for n in range(6)]
        for n, client in enumerate(clients):
            await client.finish()
            client.check(100 + 60 * n)
    again = replay(log, None)
    assert again.decisions > 5
    assert again.differences == []
    assert again.logged["admit"] == 6
    packed = tmp_path / "decisions.jsonl.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + log.read_bytes()))
    assert replay(packed, None) == again
    other = replay(log, "static-rr")
    assert other.made["move"] == other.made["avoid_oom"] == 0
    with pytest.raises(ValueError, match="unknown preset"):
        replay(log, "fast")
    kinds = {json.loads(line)["kind"] for line in log.read_text().splitlines()}
    assert kinds == {"admission", "moves"}


@pytest.mark.parametrize("line", ["{", "{}", '{"kind": "moves", "preset": "ares", "decided": []}', "[1]"])
def test_a_broken_log_is_named(tmp_path: Path, line: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(line + "\n")
    with pytest.raises(ReplayError, match=r"log\.jsonl:1: not a logged decision"):
        replay(log, None)
    with pytest.raises(ReplayError, match=r"nowhere: cannot be read"):
        replay(tmp_path / "nowhere", None)


@pytest.mark.timeout(300)  # the simulator may have to be compiled first
async def test_a_recording_of_the_run(model_folder: Path, tmp_path: Path) -> None:
    from ares.simulator.recording import read_recording

    folder = tmp_path / "run"
    async with cluster(model_folder, record=folder) as (gateway, _):
        clients = [Client(gateway, 50 + n, name=f"r{n}") for n in range(3)]
        for client in clients:
            await client.finish()
    recording = read_recording(folder)
    assert sorted(recording.workload.output_tokens.tolist()) == [50, 51, 52]
    assert (recording.first_token_s < recording.finish_s).all()
    assert (recording.meta["decode_instances"], recording.meta["preset"]) == (2, "ares")
    pytest.importorskip("numba", reason="the simulator needs its extra")
    from ares.simulator.validate import validate

    assert validate(folder, "llama-8b-rtx4090", "all")["ttft_s"]["p50"]["simulated"] > 0
