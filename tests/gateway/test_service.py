"""The gateway's state over fake instances: its sessions, and moves on command."""

import asyncio
from pathlib import Path

import pytest

from ares.config import GatewayConfig
from ares.gateway.pool.delta import EngineRefusedError
from ares.gateway.processes.shared_counts import SharedCounts
from ares.gateway.service import COMMANDED, Gateway, QueueFullError, TargetError
from ares.gateway.session.handover import NotMovableError
from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.gateways import (
    Client,
    configuration,
    find,
    finish,
    other,
    sample,
    started,
    view,
)
from tests.gateway.running import IMPATIENT, VOCABULARY
from tests.waiting import eventually


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
    await finish(clients)


async def test_many_sequences_with_moves_keep_apart(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    clients = [Client(gateway, 300, name=f"r{n}", prompt=[3 + n, 5, 7]) for n in range(8)]
    for client, name in zip(clients, [f"r{n}" for n in range(8)], strict=True):
        sequence = await client.reached(10)
        assert sequence is gateway.sessions[name]
        record = await gateway.migrate(sequence, other(gateway, sequence), "test", COMMANDED)
        assert record.outcome == "moved"
    await finish(clients, 300)
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
        *prefill, decode = [len(fake.asked) for fake in fakes]
        # Not always two each: one that has just answered more slowly is passed over.
        assert sum(prefill) == decode == 4
        assert min(prefill) >= 1
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
    await finish(clients, 100)


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
    record = await asyncio.wait_for(gateway.migrate(sequence, target, "test", COMMANDED), 60)
    assert record.outcome == "returned"
    assert list(gateway.migrations) == [record]
    assert sample(gateway, "ares_migrations_total", trigger="commanded", outcome="returned") == 1
    await client.finish()
    client.check(500)


async def test_the_shortest_context_counts(model_folder: Path) -> None:
    fakes = [
        await FakeInstance("long", "both", max_model_len=4096).start(),
        await FakeInstance("short", "both", max_model_len=512).start(),
    ]
    gateway = await started(Gateway(configuration(fakes), model_folder))
    assert gateway.maximum_model_tokens == 512
    await gateway.stop()
    for fake in fakes:
        await fake.die()


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
    assert gateway.generation_defaults.parameters == {"top_p": 0.9}


async def test_the_attempts_of_a_request_are_configured(fakes: list[FakeInstance], model_folder: Path) -> None:
    gateway = await started(Gateway(configuration(fakes, maximum_attempts=7), model_folder, IMPATIENT))
    client = Client(gateway)
    assert (await client.reached(5)).maximum_attempts == 7
    await client.finish()
    await gateway.stop()


async def test_room_is_counted_before_it_is_checked_so_that_another_process_sees_it(model_folder: Path) -> None:
    class Watched(SharedCounts):
        seen = 0

        def other_backlogs(self) -> tuple[int, int]:
            self.process = 1
            self.seen, _ = super().other_backlogs()  # as the other one would at this moment
            self.process = 0
            return super().other_backlogs()

    counts = Watched(2)
    config = GatewayConfig(model="some/model", workers=["http://127.0.0.1:1"], maximum_waiting=5)
    gateway = Gateway(config, model_folder, counts=counts)
    await gateway.start()
    counts.process = 1
    counts.set_backlog(2, 0)
    counts.process = 0
    with gateway.reserve(3):
        assert counts.seen == 3
        with pytest.raises(QueueFullError, match="5 requests wait already"):
            gateway.reserve(1)
        assert counts.seen == 4
        assert len(gateway.backlog) == 3
    assert len(gateway.backlog) == 0
    await gateway.stop()
