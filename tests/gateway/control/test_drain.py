"""Drain over fake instances: what can move leaves, what cannot stays until the deadline, and nothing new comes."""

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from typer.testing import CliRunner

from ares.cli.main import app
from ares.config import GatewayConfig
from ares.engine.control import ControlChannel
from ares.gateway.pool.delta import EngineLostError
from ares.gateway.service import Gateway
from ares.gateway.session.session import Session
from ares.protocol import messages
from tests import waiting
from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.gateways import Client, configuration, find, hold, sample, started, stop_holding
from tests.gateway.http.service import serving
from tests.gateway.running import VOCABULARY

pytestmark = pytest.mark.timeout(240)
PATIENCE_S = 60.0


eventually = functools.partial(waiting.eventually, timeout_s=PATIENCE_S)


@pytest.fixture
async def gateway(fakes: list[FakeInstance], model_folder: Path) -> AsyncIterator[Gateway]:
    made = await started(Gateway(patient(fakes), model_folder))
    yield made
    await made.stop()


@pytest.fixture
async def other(fakes: list[FakeInstance], model_folder: Path) -> AsyncIterator[Gateway]:
    """A second gateway over the same instances."""
    made = await started(Gateway(patient(fakes), model_folder))
    yield made
    await made.stop()


def patient(fakes: list[FakeInstance]) -> GatewayConfig:
    return configuration(fakes, handover_timeout_s=10)


def on(gateway: Gateway, name: str) -> list[Session]:
    return [s for s in gateway.sessions.values() if s.instance is not None and s.instance.name == name]


async def running(
    gateway: Gateway, fakes: list[FakeInstance], count: int, tokens: int = 100, **sampling: Any
) -> list[Client]:
    """Start requests, and hold all of them at 30 of their tokens."""
    hold(fakes, 35)
    clients = [Client(gateway, tokens, name=f"r{n}", prompt=[10 + n] * 5, **sampling) for n in range(count)]
    await eventually(lambda: sum(len(c.tokens) == 30 for c in clients) == count)
    return clients


async def finished(fakes: list[FakeInstance], clients: list[Client], tokens: int = 100) -> None:
    stop_holding(fakes)
    for client in clients:
        await asyncio.wait_for(client.task, PATIENCE_S)
        client.check(tokens)


async def test_everything_that_can_move_leaves_and_nothing_new_comes(
    gateway: Gateway, fakes: list[FakeInstance]
) -> None:
    clients = await running(gateway, fakes, 12)
    fakes[1].step_s = 0.02  # they shall not be at the hold again before they move
    fakes[1].hold_at = fakes[2].hold_at = 60  # a cut needs a step
    source = find(gateway, "decode-0")
    leaving = {sequence.id for sequence in on(gateway, "decode-0")}
    assert leaving
    await gateway.drainer.drain(source, 60)
    late = Client(gateway, 100, name="late")
    await eventually(lambda: not gateway.drainer.left(source))
    assert len(on(gateway, "decode-1")) == 13
    assert all(move.reason == "drain of decode-0" for move in gateway.migrations)
    # There is time for it, however little a request has: it shall not stop for the copy.
    assert {move.mode for move in gateway.migrations} == {"pre_copy"}
    # A move counts with the target's first token, which the hold may keep back.
    await finished(fakes, [*clients, late])
    assert {move.request_id for move in gateway.migrations if move.outcome == "moved"} == leaving
    assert sample(gateway, "ares_migrations_total", trigger="drain", outcome="moved") == len(leaving)


async def test_what_cannot_go_ahead_moves_all_the_same(model_folder: Path) -> None:
    async with instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes:
        fakes[2].prefix_caching = False
        await fakes[2].die()
        await fakes[2].start()
        gateway = await started(Gateway(patient(fakes), model_folder))
        try:
            clients = await running(gateway, fakes, 4)
            fakes[1].step_s = 0.02
            fakes[1].hold_at = fakes[2].hold_at = 60
            source = find(gateway, "decode-0")
            await gateway.drainer.drain(source, 60)
            await eventually(lambda: not gateway.drainer.left(source))
            await finished(fakes, clients)
            assert {(move.mode, move.outcome) for move in gateway.migrations} == {("stop_and_copy", "moved")}
        finally:
            await gateway.stop()


async def test_moves_are_paced(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    clients = await running(gateway, fakes, 20)
    fakes[1].hold_at = fakes[2].hold_at = 60
    fakes[1].faults.lose_handover = True
    await gateway.drainer.drain(find(gateway, "decode-0"), 60)
    await fakes[1].until(lambda: len(fakes[1].copies) == 4)
    await asyncio.sleep(0.3)
    assert len(fakes[1].copies) == 4
    moving = [s.id for s in gateway.sessions.values() if s.moving]
    assert len(moving) == 4
    fakes[1].faults.lose_handover = False
    await finished(fakes, clients)


async def test_what_cannot_move_finishes_where_it_is(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    clients = await running(gateway, fakes, 2, unmovable_reason="seed")
    source = find(gateway, "decode-0")
    await gateway.drainer.drain(source, 60)
    await eventually(lambda: bool(source.state.telemetry and source.state.telemetry.draining))
    assert gateway.drainer.left(source) == 1
    assert len(on(gateway, "decode-0")) == 1
    await finished(fakes, clients)
    await eventually(lambda: gateway.drainer.left(source) == 0)
    assert not gateway.migrations


async def test_at_the_deadline_the_rest_resumes_elsewhere(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    clients = await running(gateway, fakes, 4)
    fakes[1].faults.not_running = True  # no move succeeds
    fakes[2].hold_at = 60
    await gateway.drainer.drain(find(gateway, "decode-0"), 0.3)
    await eventually(lambda: len(on(gateway, "decode-1")) == 4)
    assert not any(move.outcome == "moved" for move in gateway.migrations)
    await finished(fakes, clients)


async def test_at_the_deadline_what_cannot_resume_says_so(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    clients = await running(gateway, fakes, 2, unmovable_reason="seed")
    doomed = on(gateway, "decode-0")[0].id
    await gateway.drainer.drain(find(gateway, "decode-0"), 0)
    with pytest.raises(EngineLostError, match="seed cannot be resumed exactly"):
        await clients[int(doomed[1:])].finish()
    await finished(fakes, [c for n, c in enumerate(clients) if f"r{n}" != doomed])


async def test_a_full_target_is_left_alone(model_folder: Path) -> None:
    async with instances("prefill", "decode", "decode", "decode", vocabulary=VOCABULARY) as fakes:
        fakes[2].kv_blocks = 2
        await fakes[2].die()
        await fakes[2].start()
        gateway = await started(Gateway(patient(fakes), model_folder))
        try:
            find(gateway, "decode-1").state.draining = find(gateway, "decode-2").state.draining = True
            clients = await running(gateway, fakes, 3)
            find(gateway, "decode-1").state.draining = find(gateway, "decode-2").state.draining = False
            hold(fakes, 60)
            await gateway.drainer.drain(find(gateway, "decode-0"), 60)
            await eventually(lambda: len(on(gateway, "decode-2")) == 3)
            await finished(fakes, clients)
        finally:
            await gateway.stop()


async def test_every_gateway_hears_of_it(gateway: Gateway, other: Gateway, fakes: list[FakeInstance]) -> None:
    clients = await running(other, fakes, 4)
    fakes[1].hold_at = fakes[2].hold_at = 60
    await gateway.drainer.drain(find(gateway, "decode-0"), 60)
    await eventually(lambda: find(other, "decode-0").state.draining and not on(other, "decode-0"))
    await finished(fakes, clients)
    await other.drainer.undrain(find(other, "decode-0"))
    await eventually(lambda: not find(gateway, "decode-0").state.draining)
    assert find(gateway, "decode-0").open


async def test_every_gateway_keeps_the_deadline(gateway: Gateway, other: Gateway, fakes: list[FakeInstance]) -> None:
    clients = await running(other, fakes, 4)
    fakes[1].faults.not_running = True  # no move succeeds
    fakes[2].hold_at = 60
    await gateway.drainer.drain(find(gateway, "decode-0"), 0.5)
    await eventually(lambda: len(on(other, "decode-1")) == 4)
    assert not any(move.outcome == "moved" for move in other.migrations)
    await finished(fakes, clients)
    # What drains again without end has no deadline left from before.
    await other.drainer.undrain(find(other, "decode-0"))
    await eventually(lambda: not find(gateway, "decode-0").state.draining)
    assert find(gateway, "decode-0").state.drain_deadline is None


async def test_who_opens_an_instance_again_ends_the_deadline_for_all(
    gateway: Gateway, other: Gateway, fakes: list[FakeInstance]
) -> None:
    clients = await running(other, fakes, 4)
    fakes[1].faults.not_running = True
    there = len(on(other, "decode-0"))
    source = find(other, "decode-0")
    await gateway.drainer.drain(find(gateway, "decode-0"), 2)
    await eventually(lambda: source.state.drain_deadline is not None)
    await eventually(lambda: bool((load := find(gateway, "decode-0").state.telemetry) and load.draining))
    await other.drainer.undrain(source)
    await eventually(lambda: not find(gateway, "decode-0").state.draining)
    await asyncio.sleep(2.5)
    assert source.state.drain_deadline is None
    assert len(on(other, "decode-0")) == there > 0
    await finished(fakes, clients)


async def test_the_newest_deadline_holds(gateway: Gateway, other: Gateway, fakes: list[FakeInstance]) -> None:
    clients = await running(gateway, fakes, 4)
    fakes[1].faults.not_running = True
    fakes[2].hold_at = 60
    await gateway.drainer.drain(find(gateway, "decode-0"), 600)
    await eventually(lambda: find(other, "decode-0").state.drain_deadline is not None)
    await other.drainer.drain(find(other, "decode-0"), 0.3)
    await eventually(lambda: len(on(gateway, "decode-1")) == 4)
    await finished(fakes, clients)


async def test_a_drained_instance_that_restarts_takes_work(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    await gateway.drainer.drain(find(gateway, "decode-0"), 60)
    await eventually(lambda: bool((load := find(gateway, "decode-0").state.telemetry) and load.draining))
    await fakes[1].die()
    await eventually(lambda: not find(gateway, "decode-0").health.healthy)
    await fakes[1].start()
    await eventually(lambda: find(gateway, "decode-0").open)


async def test_a_restarted_instance_is_closed_until_its_server_answers(
    gateway: Gateway, fakes: list[FakeInstance]
) -> None:
    instance = find(gateway, "decode-0")
    hello, load = instance.state.hello, instance.state.telemetry
    assert hello is not None
    assert load is not None
    await fakes[1].die()
    asked = 0

    def snapshot() -> messages.Telemetry:
        nonlocal asked
        asked += 1
        return load

    channels: list[ControlChannel] = []

    def bound() -> bool:
        with contextlib.suppress(zmq.ZMQError):  # ZeroMQ lets a port go a little after its socket is closed
            another = msgspec.structs.replace(hello, boot="another")
            channels.append(ControlChannel(fakes[1].control_address, another, snapshot))
        return bool(channels)

    await eventually(bound)
    try:
        await eventually(lambda: asked > 0)
        for _ in range(50):
            await asyncio.sleep(0.01)
            assert not instance.open
    finally:
        channels[0].close()


# --- routes and commands ---


@pytest.mark.parametrize(
    ("roles", "name", "why"),
    [
        (("prefill", "decode"), "decode-0", "the last open instance that decodes"),
        (("prefill", "decode", "decode"), "prefill-0", "the last open instance that prefills"),
        (("both",), "both-0", "the last open instance that decodes"),
        (("both", "decode"), "both-0", "the last open instance that prefills"),
        (("prefill", "both"), "both-0", "the last open instance that decodes"),
        (("both", "decode"), "decode-0", None),
        (("prefill", "both"), "prefill-0", None),
        (("both", "both"), "both-1", None),
    ],
)
async def test_the_last_open_instance_of_its_kind_is_drained_by_force_only(
    model_folder: Path, roles: tuple[messages.Role, ...], name: str, why: str | None
) -> None:
    async with instances(*roles, vocabulary=VOCABULARY) as made, serving(made, model_folder) as service:
        await eventually(lambda: all(i.open for i in service.gateway.pool.instances))
        route = f"/admin/v1/instances/{name}/drain"
        if why is not None:
            refused = await service.client.post(route, json={})
            assert refused.status_code == 409
            error = refused.json()["error"]
            assert error["code"] == "last_instance"
            assert f"{name} is {why}" in error["message"]
            assert "--force" in error["message"]
            assert find(service.gateway, name).open
        forced = await service.client.post(route, json={"force": True} if why is not None else {})
        assert forced.json()["draining"] is True
        # It is closed already: a new deadline takes nothing from anybody.
        assert (await service.client.post(route, json={"deadline_s": 5})).status_code == 200


@pytest.mark.parametrize("how", ["drain", "role"])
async def test_of_two_gateways_that_close_the_last_two_instances_one_is_refused(
    fakes: list[FakeInstance], model_folder: Path, how: str
) -> None:
    async with serving(fakes, model_folder) as service, serving(fakes, model_folder) as second:
        await eventually(lambda: all(i.open for g in (service.gateway, second.gateway) for i in g.pool.instances))
        path = "/admin/v1/instances/decode-1"
        closing = {
            "drain": lambda: second.client.post(f"{path}/drain", json={}),
            "role": lambda: second.client.post(f"{path}/role", json={"role": "prefill"}),
        }[how]
        replies = await asyncio.gather(service.client.post("/admin/v1/instances/decode-0/drain", json={}), closing())
        assert sorted(reply.status_code for reply in replies) == [200, 409]
        (refused,) = [reply for reply in replies if reply.status_code == 409]
        assert refused.json()["error"]["code"] == "last_instance"
        for gateway in (service.gateway, second.gateway):
            await eventually(lambda gateway=gateway: gateway.pool.ready)


async def test_by_force(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder) as service:
        await eventually(lambda: all(i.open for i in service.gateway.pool.instances))
        url = ["--url", f"http://127.0.0.1:{service.port}"]
        refused = await asyncio.to_thread(CliRunner().invoke, app, ["drain", "prefill-0", *url])
        assert refused.exit_code == 1
        assert "--force" in refused.output
        forced = await asyncio.to_thread(CliRunner().invoke, app, ["drain", "prefill-0", "--force", *url])
        assert forced.exit_code == 0, forced.output
        assert not find(service.gateway, "prefill-0").open


async def test_by_command(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder) as service:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances))
        url = ["--url", f"http://127.0.0.1:{service.port}"]

        async def command(*arguments: str) -> Any:
            return await asyncio.to_thread(CliRunner().invoke, app, [*arguments, *url])

        clients = await running(service.gateway, fakes, 4)
        fakes[1].hold_at = fakes[2].hold_at = 60
        drained = await command("drain", "decode-0", "--wait", "--json", "--deadline", "30")
        assert drained.exit_code == 0, drained.output
        assert json.loads(drained.stdout) == {"name": "decode-0", "draining": True, "left": 0, "deadline_s": 30.0}
        status = (await service.client.get("/admin/v1/status")).json()
        rows = {row["name"]: (row["draining"], row["left"]) for row in status["instances"]}
        assert rows == {"prefill-0": (False, None), "decode-0": (True, 0), "decode-1": (False, None)}
        assert (await command("undrain", "decode-0")).exit_code == 0
        assert find(service.gateway, "decode-0").open
        unknown = await command("drain", "nobody/else")
        assert unknown.exit_code == 1
        assert "decode-1" in unknown.output
        await finished(fakes, clients)


@pytest.mark.parametrize("body", [{"deadline_s": -1}, {"deadline_s": "soon"}, {"until": 3}])
async def test_a_wrong_deadline_is_refused(body: Any, fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder) as service:
        await eventually(lambda: service.gateway.pool.ready)
        reply = await service.client.post("/admin/v1/instances/decode-0/drain", json=body)
        assert reply.status_code == 400
        assert reply.json()["error"]["type"] == "invalid_request_error"
        assert not find(service.gateway, "decode-0").state.draining
