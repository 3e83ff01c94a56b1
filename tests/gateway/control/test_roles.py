"""Roles that change over fake instances: no token is lost, nothing is aborted, and some instance does each work."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ares.cli.main import app
from ares.gateway.control.roles import RoleError
from ares.gateway.service import Gateway
from ares.protocol import messages
from tests import waiting
from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.gateways import Client, configuration, find, finish, hold, sample, started, stop_holding
from tests.gateway.http.service import Service, serving
from tests.gateway.running import IMPATIENT, VOCABULARY

pytestmark = pytest.mark.timeout(240)
PATIENCE_S = 60.0
eventually = functools.partial(waiting.eventually, timeout_s=PATIENCE_S)


@pytest.fixture
async def gateways(fakes: list[FakeInstance], model_folder: Path) -> AsyncIterator[list[Gateway]]:
    """Two gateways over the same instances."""
    made = [await started(Gateway(configuration(fakes, handover_timeout_s=10), model_folder)) for _ in range(2)]
    yield made
    for one in made:
        await one.stop()


def roles(gateway: Gateway) -> dict[str, tuple[str, str | None]]:
    return {i.name: (i.role, i.next_role) for i in gateway.pool.instances}


async def changed(gateway: Gateway, name: str, role: messages.Role) -> None:
    await eventually(lambda: roles(gateway)[name] == (role, None))


async def test_decode_instance_becomes_a_prefill_instance_and_back_without_a_lost_token(
    gateways: list[Gateway], fakes: list[FakeInstance]
) -> None:
    first, second = gateways
    hold(fakes, 35)
    clients = [Client(gateways[n % 2], name=f"r{n}", prompt=[10 + n] * 5) for n in range(6)]
    await eventually(lambda: all(len(c.tokens) == 30 for c in clients))
    assert fakes[1].running
    fakes[1].step_s = 0.02  # they shall not be at the hold again before they move
    fakes[1].hold_at = 60  # a cut needs a step
    await first.roles.order(find(first, "decode-0"), "prefill", 60, "commanded")
    assert not find(first, "decode-0").takes("prefill")
    for gateway in gateways:
        await changed(gateway, "decode-0", "prefill")
    assert not fakes[1].running
    stop_holding(fakes)
    await finish(clients)
    moves = [move for gateway in gateways for move in gateway.migrations]
    assert {(move.source, move.target, move.reason) for move in moves} == {
        ("decode-0", "decode-1", "change of role of decode-0")
    }
    assert sample(first, "ares_role_changes_total", trigger="commanded", role="prefill") == 1
    # Each gateway uses it for prefills now, and for nothing else.
    fakes[1].asked.clear()
    more = [Client(gateways[n % 2], name=f"p{n}", prompt=[30 + n] * 5) for n in range(6)]
    await finish(more)
    assert {body["sampling_params"]["max_tokens"] for body in fakes[1].asked} == {1}
    await second.roles.order(find(second, "decode-0"), "decode", 60, "commanded")
    for gateway in gateways:
        await changed(gateway, "decode-0", "decode")
    fakes[1].asked.clear()
    more = [Client(gateways[n % 2], name=f"d{n}", prompt=[50 + n] * 5) for n in range(6)]
    await finish(more)
    assert {body["sampling_params"]["max_tokens"] for body in fakes[1].asked} == {59}
    for fake in fakes:
        await fake.until(lambda fake=fake: fake.quiet)


async def test_requests_that_cannot_move_end_where_they_are(gateways: list[Gateway], fakes: list[FakeInstance]) -> None:
    first, second = gateways
    hold(fakes, 35)
    # The position of a seeded generator is not restored here.
    clients = [Client(gateways[n % 2], name=f"r{n}", unmovable_reason="seed") for n in range(4)]
    await eventually(lambda: all(len(c.tokens) == 30 for c in clients))
    instance = find(first, "decode-0")
    await first.roles.order(instance, "prefill", 0.1, "commanded")
    for gateway in gateways:
        await eventually(lambda gateway=gateway: "remains decode" in [*gateway.pool.changes.since(0)][-1].why)
        assert roles(gateway)["decode-0"] == ("decode", None)
    # With enough time it waits for their ends.
    await second.roles.order(find(second, "decode-0"), "prefill", 600, "commanded")
    await eventually(lambda: instance.next_role == "prefill")
    stop_holding(fakes)
    await finish(clients)
    await changed(first, "decode-0", "prefill")
    assert not first.migrations


async def test_own_role_ends_a_change(gateways: list[Gateway], fakes: list[FakeInstance]) -> None:
    first, second = gateways
    hold(fakes, 35)
    clients = [Client(first, name=f"r{n}", unmovable_reason="seed") for n in range(4)]
    await eventually(lambda: all(len(c.tokens) == 30 for c in clients))
    await first.roles.order(find(first, "decode-0"), "prefill", 600, "commanded")
    await eventually(lambda: find(second, "decode-0").next_role == "prefill")
    assert not find(second, "decode-0").takes("decode")
    with pytest.raises(RoleError, match=r"about to become prefill instead of decode.*ares role decode-0 decode"):
        await second.roles.order(find(second, "decode-0"), "both", 600, "commanded")
    await second.roles.order(find(second, "decode-0"), "decode", 600, "commanded")
    for gateway in gateways:
        await eventually(lambda gateway=gateway: find(gateway, "decode-0").takes("decode"))
    stop_holding(fakes)
    await finish(clients)


async def test_change_ends_where_the_others_are_lost(gateways: list[Gateway], fakes: list[FakeInstance]) -> None:
    hold(fakes, 35)
    clients = [Client(gateways[0], name=f"r{n}", unmovable_reason="seed") for n in range(4)]
    await eventually(lambda: all(len(c.tokens) == 30 for c in clients))
    instance = find(gateways[0], "decode-0")
    on_it = [c for n, c in enumerate(clients) if gateways[0].sessions[f"r{n}"].instance is instance]
    assert on_it
    await gateways[0].roles.order(instance, "prefill", 600, "commanded")
    await fakes[2].die()
    await eventually(lambda: instance.takes("decode"))
    stop_holding(fakes)
    await finish(on_it)
    await asyncio.gather(*(c.task for c in clients), return_exceptions=True)  # those of the dead one cannot resume


async def test_two_gateways_never_give_away_the_last_two(gateways: list[Gateway]) -> None:
    orders = (
        gateway.roles.order(find(gateway, name), "prefill", 60, "commanded")
        for gateway, name in zip(gateways, ("decode-0", "decode-1"), strict=True)
    )
    results = await asyncio.gather(*orders, return_exceptions=True)
    refused = [result for result in results if isinstance(result, RoleError)]
    assert [error.code for error in refused] == ["last_instance"]
    for gateway in gateways:
        await eventually(lambda gateway=gateway: sorted(role for role, _ in roles(gateway).values()) == [
            "decode", "prefill", "prefill"
        ])  # fmt: skip


async def test_two_gateways_never_give_away_the_last_two_where_none_decodes(model_folder: Path) -> None:
    async with instances("prefill", "prefill", vocabulary=VOCABULARY) as fakes:
        both = [await started(Gateway(configuration(fakes), model_folder)) for _ in range(2)]
        orders = [
            one.roles.order(find(one, name), "decode", 60, "commanded")
            for one, name in zip(both, ("prefill-0", "prefill-1"), strict=True)
        ]
        answers = await asyncio.gather(*orders, return_exceptions=True)
        assert [answer.code for answer in answers if isinstance(answer, RoleError)] == ["last_instance"]
        await eventually(lambda: sorted(i.role for i in both[0].pool.instances) == ["decode", "prefill"])
        for one in both:
            await one.stop()


async def test_a_gateway_that_asks_for_few_reports_hears_of_a_change_at_once(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    rare = await started(Gateway(configuration(fakes, telemetry_interval_s=8.0), model_folder))
    other = await started(Gateway(configuration(fakes), model_folder))
    await other.roles.order(find(other, "decode-0"), "prefill", 60, "commanded")
    await asyncio.sleep(2.0)  # a quarter of its interval
    assert roles(rare)["decode-0"] == ("prefill", None)
    for one in (rare, other):
        await one.stop()


async def test_prefill_and_decode_on_one_instance(model_folder: Path) -> None:
    """What an instance has prefilled itself it does not pull from itself."""
    async with instances("both", "decode", vocabulary=VOCABULARY) as fakes, serving(fakes, model_folder) as service:
        await eventually(lambda: all(i.open for i in service.gateway.pool.instances))
        clients = [Client(service.gateway, name=f"r{n}", prompt=[10 + n] * 40) for n in range(6)]
        await finish(clients)
        decoded = [body for body in fakes[0].asked if body["sampling_params"]["max_tokens"] > 1]
        assert decoded
        assert not any("remote_engine_id" in body["kv_transfer_params"] for body in decoded)
        await service.quiet()


# --- routes and commands ---


async def post(service: Service, name: str, **body: Any) -> tuple[int, Any]:
    reply = await service.client.post(f"/admin/v1/instances/{name}/role", json=body)
    return reply.status_code, reply.json()


@pytest.mark.parametrize(
    ("name", "role", "status", "code", "why"),
    [
        ("decode-0", "decoding", 400, "unknown_role", "unknown role 'decoding': prefill, decode, both"),
        ("nobody", "decode", 404, "instance_not_found", "decode-1"),
        ("decode-0", "decode", 409, "role_unchanged", "has the role decode already"),
        ("prefill-0", "decode", 409, "last_instance", "the last open instance that prefills"),
    ],
)
async def test_orders_that_cannot_be(
    fakes: list[FakeInstance], model_folder: Path, name: str, role: str, status: int, code: str, why: str
) -> None:
    async with serving(fakes, model_folder) as service:
        await eventually(lambda: all(i.open for i in service.gateway.pool.instances))
        answered, body = await post(service, name, role=role)
        assert (answered, body["error"]["code"]) == (status, code)
        assert why in body["error"]["message"]
        for wrong in ({}, {"role": ""}, {"role": "decode", "deadline_s": -1}, {"role": "decode", "force": True}):
            assert (await post(service, "decode-0", **wrong))[0] == 400


@pytest.mark.parametrize(
    ("able", "why"), [([], "does not say that it can change its role"), (["decode"], "was started with --fixed-role")]
)
async def test_instances_that_keep_their_role(
    fakes: list[FakeInstance], model_folder: Path, able: list[messages.Role], why: str
) -> None:
    fakes[1].roles = able
    await fakes[1].die()
    await fakes[1].start()
    async with serving(fakes, model_folder, IMPATIENT) as service:
        await eventually(lambda: all(i.open for i in service.gateway.pool.instances))
        status, body = await post(service, "decode-0", role="prefill")
        assert (status, body["error"]["code"]) == (409, "role_fixed")
        assert why in body["error"]["message"]
        await fakes[2].die()
        await eventually(lambda: not find(service.gateway, "decode-1").health.healthy)
        status, body = await post(service, "decode-1", role="prefill")
        assert (status, body["error"]["code"]) == (503, "instance_not_ready")


async def test_by_command(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder) as service:
        await eventually(lambda: all(i.open for i in service.gateway.pool.instances))
        url = ["--url", f"http://127.0.0.1:{service.port}"]

        async def command(*arguments: str) -> Any:
            return await asyncio.to_thread(CliRunner().invoke, app, [*arguments, *url])

        done = await command("role", "decode-0", "prefill", "--wait", "--json", "--deadline", "30")
        assert done.exit_code == 0, done.output
        shown = json.loads(done.stdout)
        assert (shown["name"], shown["role"], shown["next_role"]) == ("decode-0", "prefill", None)
        refused = await command("role", "decode-1", "prefill")
        assert refused.exit_code == 1
        assert "the last open instance that decodes" in refused.output
        hold(fakes, 35)
        clients = [Client(service.gateway, name=f"r{n}", unmovable_reason="seed") for n in range(2)]
        await eventually(lambda: all(len(c.tokens) == 30 for c in clients))
        assert (await command("role", "decode-0", "both", "--wait")).exit_code == 0
        left = await command("role", "decode-1", "prefill", "--deadline", "600")
        assert "changes from decode to prefill; left: 2" in left.output
        assert "decode → prefill" in (await command("status")).output
        assert "has the role decode" in (await command("role", "decode-1", "decode")).output
        kept = await command("role", "decode-1", "prefill", "--wait", "--deadline", "0.1")
        assert kept.exit_code == 1
        assert "has the role decode" in kept.output
        listed = (await service.client.get("/admin/v1/instances")).json()["changes"]
        assert any(one["state"] == "role prefill" for one in listed)
        stop_holding(fakes)
        await finish(clients)
