"""An instance that cannot continue a request exactly never gets it: one with other settings, or without its adapter.

Each way that leads to an instance has its test: dispatch, admission, rebalancing, a drain, a lost instance, a command.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ares.cli.main import app
from ares.gateway.pool.delta import EngineRefusedError
from ares.gateway.service import COMMANDED, Gateway, TargetError
from ares.policy import Cluster, MigrationDecision
from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.gateways import Client, configuration, find, finish, started, view
from tests.gateway.http.service import serving
from tests.gateway.running import IMPATIENT, VOCABULARY
from tests.waiting import eventually

ADAPTER = "poems"
ENGINE = {"dtype": "bfloat16", "kv_cache_dtype": "auto", "model_runner": "V2", "weights": "1a"}


@pytest.fixture(params=["settings", "adapter"])
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[list[FakeInstance]]:
    """One prefill and three decode instances, of which the first is not fit for the requests of `clients`."""
    async with instances("prefill", "decode", "decode", "decode", vocabulary=VOCABULARY) as fakes:
        for fake in fakes:
            fake.adapters = [] if request.param == "adapter" and fake is fakes[1] else [ADAPTER]
            fake.configuration = dict(ENGINE)
        if request.param == "settings":
            fakes[1].configuration["dtype"] = "float16"
        await restarted(fakes)
        yield fakes


async def restarted(fakes: list[FakeInstance]) -> None:
    for fake in fakes:
        await fake.die()
        await fake.start()


async def gateway_of(fakes: list[FakeInstance], folder: Path, **settings: Any) -> Gateway:
    return await started(Gateway(configuration(fakes, **settings), folder, IMPATIENT))


def hold(fakes: list[FakeInstance], tokens: int | None) -> None:
    for fake in fakes[1:]:
        fake.hold_at = tokens


def clients(gateway: Gateway, count: int, tokens: int = 60) -> list[Client]:
    return [Client(gateway, tokens, name=f"r{n}", prompt=[10 + n] * 5, adapter=ADAPTER) for n in range(count)]


@pytest.mark.parametrize("preset", ["off", "ares-no-prediction"])
async def test_dispatch_and_admission(pool: list[FakeInstance], model_folder: Path, preset: str) -> None:
    gateway = await gateway_of(pool, model_folder, preset=preset, period_s=0.05)
    hold(pool, 30)
    made = clients(gateway, 6)
    for client in made:
        await client.reached(5)
    hold(pool, None)
    await finish(made)
    assert pool[1].asked == []
    assert len(pool[0].asked) == 6
    await gateway.stop()


async def test_rebalancing(pool: list[FakeInstance], model_folder: Path) -> None:
    """A policy that wants everything there."""
    gateway = await gateway_of(pool, model_folder, preset="ares-no-prediction", period_s=0.02)
    asked = 0

    def insists(cluster: Cluster) -> list[MigrationDecision]:
        nonlocal asked
        asked += 1
        target = cluster.instances.index("decode-0")
        return [MigrationDecision(n, int(at), target, 1.0, "x") for n, at in enumerate(cluster.location)]

    gateway.controller.rebalancing.decider.policy.decide = insists
    hold(pool, 30)
    made = clients(gateway, 2)
    for client in made:
        await client.reached(5)
    before = asked
    await eventually(lambda: asked > before + 5, 15)
    hold(pool, None)
    await finish(made)
    assert pool[1].asked == []
    assert not any(record.outcome == "moved" for record in gateway.migrations)
    await gateway.stop()


async def test_instances_that_are_alike_go_on_exchanging_requests(model_folder: Path) -> None:
    async with instances("prefill", "decode", "decode", "decode", vocabulary=VOCABULARY) as fakes:
        for fake in fakes:
            fake.configuration = dict(ENGINE, weights="1b" if fake is fakes[1] else "1a")
        await restarted(fakes)
        gateway = await gateway_of(fakes, model_folder, preset="ares-no-prediction", period_s=0.02)

        opened: set[bool] = set()

        def elsewhere(cluster: Cluster) -> list[MigrationDecision]:
            opened.add(bool(cluster.open[0]))
            return [
                MigrationDecision(n, int(at), 3 - int(at), 1.0, "x")
                for n, at in enumerate(cluster.location)
                if cluster.movable[n]
            ]

        gateway.controller.rebalancing.decider.policy.decide = elsewhere
        client = Client(gateway, 400)
        await eventually(lambda: any(record.outcome == "moved" for record in gateway.migrations), 15)
        await finish([client], 400)
        assert opened == {False}
        assert fakes[1].asked == []
        await gateway.stop()


async def test_a_drain(pool: list[FakeInstance], model_folder: Path) -> None:
    gateway = await gateway_of(pool, model_folder, handover_timeout_s=10)
    hold(pool, 35)
    made = clients(gateway, 4, 100)
    for client in made:
        await eventually(lambda client=client: len(client.tokens) == 30, 15)  # type: ignore[misc]
    source = find(gateway, "decode-1")
    hold(pool, 60)
    await gateway.drainer.drain(source, 60)
    await eventually(lambda: not gateway.drainer.left(source), 15)
    hold(pool, None)
    await finish(made, 100)
    assert pool[1].asked == []
    await gateway.stop()


async def test_a_lost_instance(pool: list[FakeInstance], model_folder: Path) -> None:
    """Where only the unfit one is left, its requests wait for another."""
    gateway = await gateway_of(pool, model_folder)
    hold(pool, 30)
    made = clients(gateway, 2)
    sessions = [await client.reached(5) for client in made]
    await pool[2].die()
    left = find(gateway, "decode-2")
    await eventually(lambda: all(session.instance is left for session in sessions), 15)
    await pool[3].die()
    await pool[2].start()
    back = find(gateway, "decode-1")
    await eventually(lambda: all(session.instance is back for session in sessions), 15)
    hold(pool, None)
    await finish(made)
    assert pool[1].asked == []
    await gateway.stop()


async def test_a_command(pool: list[FakeInstance], model_folder: Path) -> None:
    gateway = await gateway_of(pool, model_folder)
    hold(pool, 30)
    (client,) = clients(gateway, 1)
    session = await client.reached(5)
    why = f"does not have the adapter {ADAPTER}" if ADAPTER not in pool[1].adapters else "differs in what decides KV "
    for mode in ("stop_and_copy", "pre_copy"):
        with pytest.raises(TargetError, match=f"decode-0 {why}") as refusal:
            await gateway.migrate(session, find(gateway, "decode-0"), "test", COMMANDED, mode)  # type: ignore[arg-type]
        assert refusal.value.status == 409
    # Nor one that was fit when it was chosen, and has restarted since.
    with pytest.raises(EngineRefusedError, match=f"decode-0 {why}"):
        await session.placement.open(find(gateway, "decode-0"), list(session.emitted), None)
    hold(pool, None)
    await finish([client])
    assert pool[1].asked == []
    await gateway.stop()


# --- settings alone ---


async def test_a_prefill_instance_whose_kv_nobody_can_use_is_not_asked(model_folder: Path) -> None:
    async with instances("prefill", "prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes:
        for fake in fakes:
            fake.configuration = dict(ENGINE, kv_cache_dtype="fp8" if fake is fakes[0] else "auto")
        await restarted(fakes)
        gateway = await gateway_of(fakes, model_folder)
        made = [Client(gateway, name=f"r{n}") for n in range(4)]
        await finish(made)
        assert fakes[0].asked == []
        assert len(fakes[1].asked) == 4
        await fakes[1].die()
        # Nor where no other one is left: the decode instance computes the prompt.
        await finish([Client(gateway)])
        assert fakes[0].asked == []
        await gateway.stop()


async def test_only_kv_differs_and_a_lost_request_is_computed_again(model_folder: Path) -> None:
    async with instances("decode", "decode", vocabulary=VOCABULARY) as fakes:
        for fake in fakes:
            fake.configuration = dict(ENGINE, speculative_decoding="off" if fake is fakes[0] else "eagle")
        await restarted(fakes)
        gateway = await gateway_of(fakes, model_folder)
        for fake in fakes:
            fake.hold_at = 30
        client = Client(gateway)
        session = await client.reached(5)
        source, other = fakes if session.instance is find(gateway, "decode-0") else fakes[::-1]
        with pytest.raises(TargetError, match=r"drafts \(.*--speculative-config\)"):
            await gateway.migrate(session, find(gateway, other.name), "test", COMMANDED)
        await source.die()
        other.hold_at = None
        await finish([client])
        assert other.asked
        await gateway.stop()


async def test_an_instance_that_takes_shorter_sequences(model_folder: Path) -> None:
    """It appeared after the request was accepted; vLLM would refuse the request there."""
    async with instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes:
        fakes[1].hold_at = fakes[2].hold_at = 30
        await fakes[2].die()
        gateway = Gateway(configuration(fakes), model_folder, IMPATIENT)
        await gateway.start()
        client = Client(gateway, 60)
        session = await client.reached(5)
        fakes[2].max_model_len = 64
        await fakes[2].start()
        short = find(gateway, fakes[2].url) if gateway.pool.find("decode-1") is None else find(gateway, "decode-1")
        await eventually(lambda: short.state.hello is not None and short.state.telemetry is not None, 15)
        assert not view(gateway).cluster.movable.any()
        with pytest.raises(TargetError, match=r"takes sequences of fewer tokens than the 65 .*--max-model-len"):
            await gateway.migrate(session, short, "test", COMMANDED)
        fakes[1].hold_at = None
        await finish([client])
        assert fakes[2].asked == []
        await gateway.stop()


async def test_operators_are_told(model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    difference = "data type (float16, bfloat16 there: --dtype)"
    async with instances("prefill", "decode", "decode", "decode", vocabulary=VOCABULARY) as fakes:
        for fake in fakes:
            fake.configuration = dict(ENGINE, dtype="float16" if fake is fakes[1] else "bfloat16")
            fake.hold_at = 30
        await restarted(fakes)
        async with serving(fakes, model_folder, tuning=IMPATIENT) as service:
            await eventually(lambda: all(i.health.healthy for i in service.gateway.pool.instances), 15)
            await eventually(lambda: list(service.gateway.pool.differing()) == ["decode-0"], 15)
            assert f"decode-0 differs from most instances in {difference}: no request moves" in caplog.text
            rows = (await service.client.get("/admin/v1/status")).json()["instances"]
            assert {row["name"]: row["differs_in"] for row in rows if row["differs_in"]} == {"decode-0": difference}
            reply = asyncio.create_task(service.complete(max_tokens=60))
            await eventually(
                lambda: (
                    bool(service.gateway.sessions)
                    and any(s.unmovable_now() is None for s in service.gateway.sessions.values())
                ),
                15,
            )
            (name,) = service.gateway.sessions
            url = ["--url", f"http://127.0.0.1:{service.port}"]
            shown = await asyncio.to_thread(CliRunner().invoke, app, ["migrate", name, "--to", "decode-0", *url])
            assert shown.exit_code != 0
            assert difference in " ".join(shown.output.split())
            for fake in fakes:
                fake.hold_at = None
            assert (await reply).status_code == 200
