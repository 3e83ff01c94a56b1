"""Live pre-copy over fake instances: what goes ahead, when it is chosen, and what frees the pins (I5)."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ares.gateway.service import COMMANDED, Gateway
from ares.gateway.session.handover import MigrationRecord, NotMovableError
from ares.gateway.session.precopy import WantedMode
from ares.gateway.session.session import Session
from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.gateways import Client, configuration, find, sample, started
from tests.gateway.running import IMPATIENT, VOCABULARY
from tests.waiting import eventually

PROMPT = list(range(10, 90))  # 80 tokens: five full blocks of 16


@pytest.fixture
async def gateway(fakes: list[FakeInstance], model_folder: Path) -> AsyncIterator[Gateway]:
    made = await started(Gateway(configuration(fakes, handover_timeout_s=3.0), model_folder, IMPATIENT))
    yield made
    for fake in fakes:
        await fake.until(lambda fake=fake: fake.quiet)
        # Each pin was freed once: by a pull or by a release, not by both.
        assert len(set(fake.freed)) == len(fake.freed)
    await made.stop()


class Copying:
    """A request that runs on decode-0, and its move to decode-1."""

    def __init__(self, gateway: Gateway, fakes: list[FakeInstance], maximum: int) -> None:
        self.gateway = gateway
        self.source, self.target = fakes[1], fakes[2]
        find(gateway, "decode-1").state.draining = True
        # However slow the machine, it still runs when the move is ordered.
        self.source.hold_at = len(PROMPT) + maximum - 50
        self.client = Client(gateway, maximum, prompt=PROMPT)
        self.maximum = maximum

    async def running(self) -> Session:
        session = await self.client.reached(5)
        find(self.gateway, "decode-1").state.draining = False
        return session

    async def move(self, session: Session, mode: WantedMode = "pre_copy") -> MigrationRecord:
        target = find(self.gateway, "decode-1")
        return await asyncio.wait_for(self.gateway.migrate(session, target, "test", COMMANDED, mode), 60)

    async def begun(self, session: Session) -> "asyncio.Task[MigrationRecord]":
        """Order the move; the copy has begun, and ends when the target is no longer silent."""
        self.target.faults.silent_stream = True
        move = asyncio.create_task(self.move(session))
        await self.target.until(lambda: bool(self.target.running))
        return move

    async def finish(self) -> None:
        self.source.hold_at = None
        await self.client.finish()
        self.client.check(self.maximum)


@pytest.fixture
async def copying(gateway: Gateway, fakes: list[FakeInstance]) -> Copying:
    return Copying(gateway, fakes, 300)


async def test_full_blocks_go_ahead(gateway: Gateway, copying: Copying) -> None:
    session = await copying.running()
    record = await copying.move(session)
    assert (record.outcome, record.mode) == ("moved", "pre_copy")
    assert record.precopied_tokens >= 80
    assert record.precopied_tokens % 16 == 0
    assert record.precopy_s is not None
    ahead, moved = copying.target.asked
    assert ahead["kv_transfer_params"]["ares_ahead"]
    assert ahead["sampling_params"]["max_tokens"] == 1
    # What follows the copied blocks is computed for nothing; what was copied is not computed again.
    assert len(ahead["token_ids"]) == record.precopied_tokens + 1
    assert "ares_ahead" not in moved["kv_transfer_params"]
    assert sample(gateway, "ares_migration_precopied_tokens_total") == record.precopied_tokens
    await copying.finish()
    assert [name.endswith("copy") or "copy-" in name for name in copying.source.freed] == [True, False]
    assert copying.source.released == []


async def test_the_request_goes_on_while_it_is_copied(copying: Copying) -> None:
    session = await copying.running()
    move = await copying.begun(session)
    assert session.incoming is find(copying.gateway, "decode-1")
    assert session.moving
    assert copying.source.cuts == []
    before = len(copying.client.tokens)
    await eventually(lambda: len(copying.client.tokens) > before + 5)
    with pytest.raises(NotMovableError, match="moving"):
        await copying.move(session)
    copying.target.faults.silent_stream = False
    assert (await move).outcome == "moved"
    await copying.finish()


async def test_stop_and_copy_on_command(copying: Copying) -> None:
    record = await copying.move(await copying.running(), "stop_and_copy")
    assert (record.outcome, record.mode, record.precopied_tokens) == ("moved", "stop_and_copy", 0)
    assert copying.source.copies == []
    await copying.finish()


@pytest.mark.parametrize(("speed", "mode"), [(0.0, "stop_and_copy"), (1e9, "stop_and_copy"), (1e6, "pre_copy")])
async def test_the_forecast_of_the_copy_chooses(copying: Copying, speed: float, mode: str) -> None:
    """85 kB: 85 us at 1 GB/s; 43 steps of 2 ms at 1 MB/s."""
    copying.target.pull_bytes_per_s = speed
    session = await copying.running()
    instance = find(copying.gateway, "decode-1")
    await eventually(
        lambda: instance.state.telemetry is not None and instance.state.telemetry.pull_bytes_per_s == speed
    )
    assert (await copying.move(session, "auto")).mode == mode
    await copying.finish()


async def test_a_target_without_prefix_cache_gets_all_at_once(model_folder: Path) -> None:
    async with instances("prefill", "decode", "decode", vocabulary=VOCABULARY, prefix_caching=False) as fakes:
        gateway = await started(Gateway(configuration(fakes), model_folder, IMPATIENT))
        copying = Copying(gateway, fakes, 200)
        record = await copying.move(await copying.running())
        assert (record.outcome, record.mode) == ("moved", "stop_and_copy")
        assert copying.source.copies == []
        await copying.finish()
        await gateway.stop()


async def test_nothing_to_copy_is_an_ordinary_move(
    gateway: Gateway, copying: Copying, fakes: list[FakeInstance]
) -> None:
    find(gateway, "decode-1").state.draining = True
    short = Client(gateway, 200, name="short", prompt=[5, 6, 7])
    fakes[1].hold_at = 12
    session = await short.reached(5)
    find(gateway, "decode-1").state.draining = False
    record = await copying.move(session)
    assert (record.outcome, record.precopied_tokens) == ("moved", 0)
    await short.finish()
    short.check(200)
    await copying.finish()


@pytest.mark.parametrize("fault", ["refuse", "fail_pull", "hang", "dead"])
async def test_a_copy_that_fails_leaves_the_request_where_it_is(copying: Copying, fault: str) -> None:
    session = await copying.running()
    match fault:
        case "refuse":
            copying.target.faults.refuse = 503
        case "fail_pull":
            copying.target.faults.fail_pull = True
        case "hang":
            copying.target.faults.hang = True
        case "dead":
            dying = await copying.begun(session)
            copying.target.reset_connections()
    record = await (dying if fault == "dead" else copying.move(session))
    assert record.outcome == "not_copied"
    assert sample(copying.gateway, "ares_migrations_total", trigger="commanded", outcome="not_copied") == 1
    assert copying.source.cuts == []
    if fault == "hang":
        # A target that was asked and is silent might still pull: only its lease frees the pin.
        assert copying.source.pinned != []
        copying.source.pins.clear()
    assert not session.moving
    await copying.finish()


async def test_a_source_that_does_not_answer(copying: Copying) -> None:
    session = await copying.running()
    copying.source.faults.deaf = True
    assert (await copying.move(session)).outcome == "not_copied"
    # It hears the order after all: what it pins then, nobody waits for.
    copying.source.faults.deaf = False
    await copying.source.until(lambda: bool(copying.source.released))
    await copying.finish()
    assert copying.source.freed == copying.source.released


async def test_the_request_ends_while_it_is_copied(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    copying = Copying(gateway, fakes, 60)
    session = await copying.running()
    move = await copying.begun(session)
    await copying.finish()
    copying.target.faults.silent_stream = False
    record = await move
    assert (record.outcome, record.mode) == ("finished_first", "pre_copy")
    assert copying.source.cuts == []


async def test_the_client_leaves_while_it_is_copied(copying: Copying) -> None:
    session = await copying.running()
    move = await copying.begun(session)
    copying.client.task.cancel()
    await asyncio.gather(copying.client.task, return_exceptions=True)
    copying.target.faults.silent_stream = False
    record = await move
    assert record.outcome == "cancelled"
    assert copying.source.cuts == []


async def test_the_source_dies_while_it_is_copied(copying: Copying) -> None:
    session = await copying.running()
    move = await copying.begun(session)
    await copying.source.die()
    copying.target.faults.silent_stream = False
    record = await move
    # Resumed elsewhere by the time the copy was complete, or about to be.
    assert record.outcome in {"not_running", "not_copied"}
    await copying.finish()
    assert copying.client.tokens
