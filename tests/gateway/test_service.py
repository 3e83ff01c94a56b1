"""The gateway's state over fake instances: placement, moves on command and by policy, instances that come and go."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.asyncio

from ares.config import GatewayConfig
from ares.gateway.control.snapshot import ClusterSnapshot
from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.generate import Delta, EngineRefusedError, http_client
from ares.gateway.pool.instance import Instance
from ares.gateway.service import COMMANDED, Gateway, TargetError
from ares.gateway.session.handover import NotMovableError
from ares.gateway.session.session import Session
from ares.mock_engine.http import Connection
from ares.policy import Cluster, MigrationDecision
from tests.gateway.fakes import FakeInstance, eventually, expected, instances
from tests.gateway.running import IMPATIENT, VOCABULARY

PROMPT = [10, 20, 30, 40, 50]


def configuration(fakes: list[FakeInstance], **settings: Any) -> GatewayConfig:
    """Quiet by default: no policy interferes."""
    defaults: dict[str, Any] = {"preset": "off", "telemetry_interval_s": 0.02, "handover_timeout_s": 0.5}
    return GatewayConfig(model="some/model", workers=[fake.url for fake in fakes], **(defaults | settings))


async def started(gateway: Gateway) -> Gateway:
    await gateway.start()
    await eventually(lambda: all(i.health.healthy and i.state.hello for i in gateway.pool.instances), 15)
    return gateway


@pytest.fixture
async def gateway(fakes: list[FakeInstance], model_folder: Path) -> AsyncIterator[Gateway]:
    made = await started(Gateway(configuration(fakes), model_folder, IMPATIENT))
    yield made
    await made.stop()


class Client:
    """Takes the tokens of one sequence."""

    def __init__(
        self, gateway: Gateway, maximum: int = 60, *, name: str = "request", prompt: list[int] = PROMPT, **sampling: Any
    ) -> None:
        self.tokens: list[int] = []
        self.prompt = prompt
        self._gateway = gateway
        self._name = name
        self.task = asyncio.create_task(gateway.generate(name, prompt, Sampling({}, maximum, **sampling), self._emit))

    async def _emit(self, batch: list[Delta]) -> bool:
        self.tokens += [token for delta in batch for token in delta.token_ids or []]
        return False

    async def reached(self, count: int) -> Session:
        await eventually(lambda: len(self.tokens) >= count or self.task.done())
        return self._gateway.sessions[self._name]

    async def finish(self) -> None:
        await asyncio.wait_for(self.task, 10)

    def check(self, maximum: int = 60) -> None:
        assert self.tokens == expected(self.prompt, maximum, vocabulary=VOCABULARY)


def find(gateway: Gateway, name: str) -> Instance:
    found = gateway.pool.find(name)
    assert found is not None
    return found


def view(gateway: Gateway, exclude: set[str] = frozenset()) -> ClusterSnapshot:  # type: ignore[assignment]
    return gateway.controller.snapshots.build(gateway.sessions.values(), exclude)


def other(gateway: Gateway, sequence: Session) -> Instance:
    return next(i for i in gateway.pool.decode() if i is not sequence.instance)


def sample(gateway: Gateway, name: str, **labels: str) -> float:
    return gateway.metrics.registry.get_sample_value(name, labels) or 0.0


# --- sequences and placement ---


async def test_a_sequence_is_known_while_it_runs(gateway: Gateway) -> None:
    client = Client(gateway)
    await client.reached(5)
    assert list(gateway.sessions) == ["request"]
    assert sample(gateway, "ares_active_requests") == 1
    await client.finish()
    client.check()
    assert gateway.sessions == {}
    assert sample(gateway, "ares_active_requests") == 0


async def test_a_failed_sequence_is_forgotten(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    for fake in fakes:
        fake.faults.refuse = 400
    with pytest.raises(EngineRefusedError):
        await Client(gateway).finish()
    assert gateway.sessions == {}


async def test_two_sequences_of_one_name(gateway: Gateway) -> None:
    clients = [Client(gateway), Client(gateway)]
    await clients[0].reached(5)
    assert set(gateway.sessions) == {"request", "request#2"}
    for client in clients:
        await client.finish()
        client.check()


async def test_many_sequences_with_moves_keep_apart(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    clients = [Client(gateway, 300, name=f"r{n}", prompt=[3 + n, 5, 7]) for n in range(8)]
    for client, name in zip(clients, [f"r{n}" for n in range(8)], strict=True):
        sequence = await client.reached(10)
        assert sequence is gateway.sessions[name]
        record = await gateway.migrate(sequence, other(gateway, sequence), "test", COMMANDED)
        assert record.outcome == "moved"
    for client in clients:
        await client.finish()
        client.check(300)
    for fake in fakes:
        await fake.until(lambda fake=fake: fake.quiet)
    assert len(gateway.migrations) == 8
    assert sample(gateway, "ares_migrations_total", trigger="commanded", outcome="moved") == 8
    assert sample(gateway, "ares_migration_pulled_tokens_total") == sum(
        r.pulled_tokens or 0 for r in gateway.migrations
    )


async def test_round_robin_over_decode_instances(gateway: Gateway) -> None:
    clients = [Client(gateway, name=f"r{n}") for n in range(4)]
    places = []
    for n, client in enumerate(clients):
        await client.reached(3)
        instance = gateway.sessions[f"r{n}"].instance
        assert instance is not None
        places.append(instance.name)
    assert sorted(places) == ["decode-0", "decode-0", "decode-1", "decode-1"]
    for client in clients:
        await client.finish()


async def test_prefill_instances_take_turns(model_folder: Path) -> None:
    async with instances("prefill", "prefill", "decode", vocabulary=VOCABULARY) as fakes:
        gateway = await started(Gateway(configuration(fakes), model_folder))
        for _ in range(4):
            await Client(gateway, 3).finish()
        assert [len(fake.asked) for fake in fakes] == [2, 2, 4]
        await gateway.stop()


async def test_a_pinned_sequence_is_counted_and_stays(gateway: Gateway) -> None:
    client = Client(gateway, unmovable_reason="seed")
    sequence = await client.reached(5)
    with pytest.raises(NotMovableError, match="seed"):
        await gateway.migrate(sequence, other(gateway, sequence), "test", COMMANDED)
    assert sample(gateway, "ares_unmovable_requests_total", reason="seed") == 1
    await client.finish()
    client.check()
    assert len(gateway.migrations) == 0


# --- targets ---


async def test_targets_that_cannot_take_it(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    client = Client(gateway, 600)
    sequence = await client.reached(5)
    assert sequence.instance is not None
    with pytest.raises(TargetError, match="already") as same:
        await gateway.migrate(sequence, sequence.instance, "test", COMMANDED)
    assert same.value.status == 409
    with pytest.raises(TargetError, match="does not decode") as prefill:
        await gateway.migrate(sequence, find(gateway, "prefill-0"), "test", COMMANDED)
    assert prefill.value.status == 409
    target = other(gateway, sequence)
    target.state.draining = True
    with pytest.raises(TargetError, match="not taking") as draining:
        await gateway.migrate(sequence, target, "test", COMMANDED)
    assert draining.value.status == 503
    target.state.draining = False
    await next(fake for fake in fakes if fake.name == target.name).die()
    await eventually(lambda: not target.health.healthy)
    with pytest.raises(TargetError, match="not taking"):
        await gateway.migrate(sequence, target, "test", COMMANDED)
    assert len(gateway.migrations) == 0
    await client.finish()
    client.check(600)


async def test_a_full_target(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    client = Client(gateway, 200, prompt=[9] * 40)
    sequence = await client.reached(5)
    target = other(gateway, sequence)
    fake = next(fake for fake in fakes if fake.name == target.name)
    fake.pin("elsewhere", [0] * 16 * (fake.kv_blocks - 3))
    await eventually(lambda: target.state.free_blocks == 3)
    with pytest.raises(TargetError, match="full") as full:
        await gateway.migrate(sequence, target, "test", COMMANDED)
    assert full.value.status == 409
    fake.pins.release("elsewhere")
    await client.finish()


async def test_room_is_not_promised_twice(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    """Moves that are on their way to a target count before its telemetry shows them."""
    source, target = find(gateway, "decode-0"), find(gateway, "decode-1")
    fakes[1].hold_at = 50
    target.state.draining = True
    clients = [Client(gateway, 100, name=f"r{n}", prompt=[9 + n] * 40) for n in range(2)]
    sequences = [await client.reached(10) for client in clients]
    assert [sequence.instance for sequence in sequences] == [source, source]
    target.state.draining = False
    fakes[2].faults.answer_after_s = 0.3
    fakes[2].pin("elsewhere", [0] * 16 * (fakes[2].kv_blocks - 8))  # 50 tokens need 4 blocks and one more
    await eventually(lambda: target.state.free_blocks == 8)
    first = asyncio.create_task(gateway.migrate(sequences[0], target, "test", COMMANDED))
    await eventually(lambda: sequences[0].incoming is target)
    assert view(gateway).cluster.promised_tokens.tolist() == [0, 64]  # 50 tokens in blocks of 16
    with pytest.raises(TargetError, match="full"):
        await gateway.migrate(sequences[1], target, "test", COMMANDED)
    assert (await first).outcome == "moved"
    fakes[1].hold_at = None
    fakes[2].pins.release("elsewhere")
    for client in clients:
        await client.finish()
        client.check(100)


async def test_a_command_that_is_given_up_still_moves(gateway: Gateway) -> None:
    """An operator's lost connection must not leave a request half-way."""
    client = Client(gateway, 400)
    sequence = await client.reached(5)
    command = asyncio.create_task(gateway.migrate(sequence, other(gateway, sequence), "test", COMMANDED))
    await eventually(lambda: sequence.moving)
    command.cancel()
    await client.finish()
    client.check(400)
    assert [record.outcome for record in gateway.migrations] == ["moved"]


async def test_a_hanging_target_is_recorded(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    client = Client(gateway, 500)
    sequence = await client.reached(5)
    target = other(gateway, sequence)
    next(fake for fake in fakes if fake.name == target.name).faults.hang = True
    record = await asyncio.wait_for(gateway.migrate(sequence, target, "test", COMMANDED), 4)
    assert record.outcome == "returned"
    assert list(gateway.migrations) == [record]
    assert sample(gateway, "ares_migrations_total", trigger="commanded", outcome="returned") == 1
    await client.finish()
    client.check(500)


# --- the controller ---


async def test_a_controller_that_throws_does_not_stop_serving(fakes: list[FakeInstance], model_folder: Path) -> None:
    gateway = Gateway(configuration(fakes, preset="ares-no-prediction", period_s=0.01), model_folder)

    def broken(cluster: Cluster) -> list[MigrationDecision]:
        raise RuntimeError("a bug in the policy")

    await started(gateway)
    gateway.controller.rebalance_decider.policy.decide = broken
    client = Client(gateway)
    await client.finish()
    client.check()
    await eventually(lambda: sample(gateway, "ares_rebalance_decisions_total", result="failed") >= 2)
    await gateway.stop()


async def test_a_policy_that_orders_nonsense_costs_nothing(fakes: list[FakeInstance], model_folder: Path) -> None:
    """It orders every request to where it is, to a prefill role and to an instance that refuses."""
    gateway = Gateway(configuration(fakes, preset="ares-no-prediction", period_s=0.02), model_folder)
    fakes[2].faults.refuse = 503
    turn = 0

    def insists(cluster: Cluster) -> list[MigrationDecision]:
        nonlocal turn
        turn += 1
        return [
            MigrationDecision(request=n, source=int(at), target=turn % 3, gain=1.0, reason="x")
            for n, at in enumerate(cluster.location)
        ]

    await started(gateway)
    gateway.controller.rebalance_decider.policy.decide = insists
    clients = [Client(gateway, 300, name=f"r{n}") for n in range(2)]
    for client in clients:
        await client.finish()
        client.check(300)
    assert turn > 5
    await gateway.stop()


async def test_the_policy_evens_out_the_load(fakes: list[FakeInstance], model_folder: Path) -> None:
    settings = {"preset": "ares-no-prediction", "period_s": 0.05, "cooldown_s": 60}
    gateway = await started(Gateway(configuration(fakes, **settings), model_folder))
    find(gateway, "decode-1").state.draining = True
    clients = [Client(gateway, 500, name=f"r{n}", prompt=[9 + n] * 50) for n in range(4)]
    for client in clients:
        await client.reached(5)
    find(gateway, "decode-1").state.draining = False
    await eventually(lambda: sum(record.outcome == "moved" for record in gateway.migrations) >= 2)
    for client in clients:
        await client.finish()
        client.check(500)
    # Its cooldown keeps a request that has moved from moving again.
    moved = [record.request_id for record in gateway.migrations if record.outcome == "moved"]
    assert len(moved) == len(set(moved))
    assert all(record.reason.startswith("ares-no-prediction: ") for record in gateway.migrations)
    assert sample(gateway, "ares_rebalance_decisions_total", result="moved") >= 1
    await gateway.stop()


async def test_the_off_preset_never_decides(gateway: Gateway) -> None:
    client = Client(gateway)
    await client.finish()
    assert sample(gateway, "ares_rebalance_decisions_total", result="kept") == 0
    assert len(gateway.migrations) == 0


async def test_the_view_of_the_policy(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    for fake in fakes:
        fake.hold_at = len(PROMPT) + 10
    client = Client(gateway)
    sequence = await client.reached(10)
    body = json.dumps({"token_ids": [7] * 30, "sampling_params": {"max_tokens": 50}}).encode()
    stranger = fakes[1].begin(body, Connection(fakes[1]))
    where = ["decode-0", "decode-1"].index(sequence.instance.name if sequence.instance else "")
    await eventually(lambda: len(view(gateway).cluster.requests) == 2)
    seen = view(gateway, {"decode-1"})
    cluster, found = seen.cluster, seen.instances
    assert [i.name for i in found] == list(cluster.instances) == ["decode-0", "decode-1"]
    assert cluster.capacity_tokens.tolist() == [16000] * 2
    assert cluster.open.tolist() == [True, False]
    assert cluster.requests == ("request", stranger.key)
    assert cluster.location.tolist() == [where, 0]
    assert cluster.resident_tokens.tolist() == [15, 30]
    assert cluster.movable.tolist() == [True, False]
    assert cluster.promised_tokens.tolist() == [0, 0]
    sequence.moved_at = asyncio.get_running_loop().time()
    assert not np.any(view(gateway).cluster.movable)  # cooling down
    fakes[1].running.pop(str(stranger.key))
    for fake in fakes:
        fake.hold_at = None
    await client.finish()


# --- instances that come and go ---


async def test_a_restart_is_noticed(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    instance = find(gateway, "decode-0")
    assert instance.state.hello is not None
    first = instance.state.hello.boot
    await fakes[1].die()
    await eventually(lambda: not instance.health.healthy)
    assert gateway.pool.ready  # the other one
    await fakes[1].start()
    await eventually(
        lambda: instance.health.healthy and instance.state.hello is not None and instance.state.hello.boot != first
    )
    # Everybody who may pull from it, or it from them, is introduced again.
    await eventually(lambda: fakes[1].boot in {peer.engine_id for peer in fakes[2].peers})
    await eventually(lambda: {fakes[0].boot, fakes[2].boot} <= {peer.engine_id for peer in fakes[1].peers})
    client = Client(gateway, 300)
    sequence = await client.reached(10)
    assert (await gateway.migrate(sequence, other(gateway, sequence), "test", COMMANDED)).outcome == "moved"
    await client.finish()
    client.check(300)


@pytest.mark.parametrize("preset", ["off", "ares"])
async def test_an_instance_that_joins_without_what_a_request_needs_never_gets_it(
    preset: str, model_folder: Path
) -> None:
    async with instances("prefill", "decode", "decode", "decode", vocabulary=VOCABULARY, carries=("seed",)) as fakes:
        _, home, lacking, fit = fakes
        gateway = await started(Gateway(configuration(fakes, preset=preset), model_folder, IMPATIENT))
        try:
            home.hold_at = fit.hold_at = 50
            client = Client(gateway, needs=frozenset({"seed"}))
            sequence = await client.reached(10)
            assert sequence.instance is find(gateway, home.name)
            assert view(gateway).cluster.movable.all()
            await lacking.die()
            lacking.carries = ()
            await lacking.start()
            joined = find(gateway, lacking.name)
            await eventually(lambda: joined.open and joined.state.hello is not None and not joined.state.hello.carries)
            with pytest.raises(TargetError, match="decode-1 does not restore seed") as refusal:
                await gateway.migrate(sequence, joined, "test", COMMANDED)
            assert refusal.value.status == 409
            gateway.check_target(sequence, find(gateway, fit.name))
            assert not view(gateway).cluster.movable.any()
            # Nor does it go there when it has to leave.
            await home.die()
            await eventually(lambda: sequence.instance is find(gateway, fit.name))
            fit.hold_at = None
            await client.finish()
            client.check()
            assert lacking.asked == []
        finally:
            await gateway.stop()


async def test_a_restart_under_running_sequences(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    clients = [Client(gateway, 300, name=f"r{n}") for n in range(4)]
    for client in clients:
        await client.reached(10)
    await fakes[1].die()
    await fakes[1].start()
    for client in clients:
        await client.finish()
        client.check(300)
    await eventually(lambda: find(gateway, "decode-0").health.healthy)


async def test_an_instance_that_appears_later(model_folder: Path) -> None:
    cluster: dict[str, FakeInstance] = {}
    first = await FakeInstance("first", "both", cluster, vocabulary=VOCABULARY).start()
    late = FakeInstance("late", "both", cluster, vocabulary=VOCABULARY)
    gateway = Gateway(configuration([first, late]), model_folder, IMPATIENT)
    await gateway.start()
    await eventually(lambda: gateway.pool.ready)
    assert [i.name for i in gateway.pool.instances] == ["first", late.url]
    await late.start()
    await eventually(lambda: gateway.pool.find("late") is not None and find(gateway, "late").open)
    await gateway.stop()
    await first.die()
    await late.die()


async def test_nobody_there(model_folder: Path) -> None:
    gateway = Gateway(configuration([FakeInstance("absent", "both", {})]), model_folder, IMPATIENT)
    await gateway.start()
    assert gateway.pool.ready is False
    assert gateway.maximum_model_tokens is None
    await gateway.stop()


async def test_the_shortest_context_counts(model_folder: Path) -> None:
    cluster: dict[str, FakeInstance] = {}
    fakes = [
        await FakeInstance("long", "both", cluster, max_model_len=4096).start(),
        await FakeInstance("short", "both", cluster, max_model_len=512).start(),
    ]
    gateway = await started(Gateway(configuration(fakes), model_folder))
    assert gateway.maximum_model_tokens == 512
    await gateway.stop()
    for fake in fakes:
        await fake.die()


async def test_commands_to_a_lost_instance_do_not_block() -> None:
    """ZeroMQ queues for a peer that is gone; when the queue is full, a gateway must not wait for it."""
    async with http_client() as http:
        instance = Instance("http://127.0.0.1:1", http, 0.1)
        socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 1)
        socket.connect("tcp://127.0.0.1:1")
        instance._socket = socket
        try:
            async with asyncio.timeout(2):
                for _ in range(5):
                    await instance.control.release("key")
                with pytest.raises(TimeoutError):
                    await instance.control.cut("key", 0.05)
        finally:
            socket.close()


async def test_stop_ends_every_task(fakes: list[FakeInstance], model_folder: Path) -> None:
    before = asyncio.all_tasks()
    gateway = await started(Gateway(configuration(fakes, preset="ares-no-prediction"), model_folder))
    await gateway.stop()
    mine = {task for task in asyncio.all_tasks() - before if "ares" in repr(task.get_coro())}
    assert {task for task in mine if not task.done()} == set()


async def test_an_unknown_preset(gateway: Gateway) -> None:
    with pytest.raises(ValueError, match="unknown preset 'fast'"):
        gateway.controller.use_preset("fast")
    assert gateway.controller.preset == "off"
    assert gateway.sampling_defaults == {"top_p": 0.9}


async def test_the_attempts_of_a_request_are_configured(fakes: list[FakeInstance], model_folder: Path) -> None:
    gateway = await started(Gateway(configuration(fakes, maximum_attempts=7), model_folder, IMPATIENT))
    client = Client(gateway)
    assert (await client.reached(5)).maximum_attempts == 7
    await client.finish()
    await gateway.stop()


# --- a gateway that stands still, and instances of one name ---


async def test_a_gateway_that_stood_still_gives_nobody_up(fakes: list[FakeInstance], model_folder: Path) -> None:
    """As after SIGSTOP: it has not listened, and what was sent meanwhile it has yet to read."""
    tuning = replace(IMPATIENT, frozen_s=0.3, alive_s=0.3, supervision_s=0.05)
    gateway = await started(Gateway(configuration(fakes), model_folder, tuning))
    for fake in fakes[1:]:
        fake.hold_at = 30
    client = Client(gateway, 200)
    sequence = await client.reached(20)
    running = sequence.key
    time.sleep(1.0)  # noqa: ASYNC251 - this is what the test is about
    await asyncio.sleep(0.2)
    for fake in fakes[1:]:
        fake.hold_at = None
    await client.reached(100)
    assert sequence.key == running
    await client.finish()
    client.check(200)
    await gateway.stop()


async def test_instances_that_call_themselves_the_same_are_told_apart(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    for fake in fakes[1:]:
        fake.name = "decode-8100"
    fakes[1].faults.refuse = 503
    made = await started(Gateway(configuration(fakes), model_folder))
    names = {i.name for i in made.pool.decode()}
    assert names == {f"decode-8100@{fake.url.removeprefix('http://')}" for fake in fakes[1:]}
    clients = [Client(made, name=f"r{n}") for n in range(6)]
    for client in clients:
        await client.finish()
        client.check()
    await made.stop()
