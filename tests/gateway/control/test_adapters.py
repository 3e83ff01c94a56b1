"""LoRA adapters: found on the instances, asked for by name, and only placed where they are."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ares.gateway.service import COMMANDED, Gateway, TargetError
from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.gateways import Client, configuration, find, started, view
from tests.gateway.http.service import MODEL, PROMPT, serving
from tests.gateway.running import IMPATIENT, VOCABULARY
from tests.waiting import eventually

ADAPTER = "poems"


@pytest.fixture
async def pool() -> AsyncIterator[list[FakeInstance]]:
    """Two prefill and three decode instances: the first of each does not have the adapter."""
    roles = ("prefill", "prefill", "decode", "decode", "decode")
    async with instances(*roles, vocabulary=VOCABULARY) as fakes:
        for fake in (fakes[1], fakes[3], fakes[4]):
            fake.adapters = [ADAPTER, "prose"] if fake is fakes[4] else [ADAPTER]
        yield fakes


@pytest.fixture
async def gateway(pool: list[FakeInstance], model_folder: Path) -> AsyncIterator[Gateway]:
    made = await started(Gateway(configuration(pool), model_folder, IMPATIENT))
    yield made
    await made.stop()


async def test_the_adapters_of_the_instances_are_models_of_the_gateway(
    pool: list[FakeInstance], model_folder: Path
) -> None:
    async with serving(pool, model_folder, tuning=IMPATIENT) as service:
        await eventually(lambda: service.gateway.pool.adapters == [ADAPTER, "prose"], 15)
        listed = (await service.client.get("/v1/models")).json()["data"]
        assert [(entry["id"], entry.get("parent")) for entry in listed] == [
            (MODEL, None),
            (ADAPTER, MODEL),
            ("prose", MODEL),
        ]
        for name, sent in ((MODEL, None), (None, None), (ADAPTER, ADAPTER)):
            for fake in pool:
                fake.asked.clear()
            reply = await service.complete(model=name)
            assert reply.json()["model"] == (name or MODEL)
            assert [body.get("model") for fake in pool for body in fake.asked] == [sent, sent]
        chat = await service.chat(model="prose")
        assert chat.json()["model"] == "prose"
        assert pool[4].asked[-1]["model"] == "prose"
        assert (await service.complete(model="novels")).status_code == 404


async def test_a_name_of_the_model_is_the_model_even_where_an_adapter_has_it_too(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    for fake in fakes:
        fake.adapters = [MODEL]
    async with serving(fakes, model_folder, tuning=IMPATIENT) as service:
        await eventually(lambda: service.gateway.pool.adapters == [MODEL], 15)
        assert [entry["id"] for entry in (await service.client.get("/v1/models")).json()["data"]] == [MODEL]
        assert (await service.complete(prompt=PROMPT)).status_code == 200
        assert all("model" not in body for fake in fakes for body in fake.asked)


async def test_an_instance_without_the_adapter_never_gets_its_requests(
    gateway: Gateway, pool: list[FakeInstance]
) -> None:
    without, first, second = pool[2:]
    for fake in pool[2:]:
        fake.hold_at = 30
    clients = [Client(gateway, name=f"r{n}", adapter=ADAPTER) for n in range(4)]
    sessions = [await client.reached(5) for client in clients]
    assert pool[0].asked == without.asked == []
    with pytest.raises(TargetError, match=f"decode-0 does not have the adapter {ADAPTER}") as refusal:
        await gateway.migrate(sessions[0], find(gateway, without.name), "test", COMMANDED)
    assert refusal.value.status == 409
    # Not by the policy either, which may order any target.
    assert not view(gateway).cluster.movable.any()
    # Nor where its instance is lost, with only those without it idle.
    await first.die()
    other = find(gateway, second.name)
    await eventually(lambda: all(session.instance is other for session in sessions), 15)
    second.hold_at = None
    for client in clients:
        await client.finish()
        client.check()
    assert pool[0].asked == without.asked == []
    assert {body["model"] for fake in pool for body in fake.asked} == {ADAPTER}


async def test_the_policy_may_move_what_every_decode_instance_has(model_folder: Path) -> None:
    async with instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes:
        fakes[1].adapters = fakes[2].adapters = [ADAPTER]
        gateway = await started(Gateway(configuration(fakes), model_folder, IMPATIENT))
        fakes[1].hold_at = fakes[2].hold_at = 30
        client = Client(gateway, adapter=ADAPTER)
        await client.reached(5)
        # The prefill instance does not have it: the decode instance computes the prompt.
        assert fakes[0].asked == []
        assert view(gateway).cluster.movable.all()
        fakes[1].hold_at = fakes[2].hold_at = None
        await client.finish()
        client.check()
        await gateway.stop()


@pytest.mark.parametrize("mode", ["stop_and_copy", "pre_copy"])
async def test_moves_and_copies_ahead_name_the_adapter(
    fakes: list[FakeInstance], model_folder: Path, mode: str
) -> None:
    """vLLM keeps the cached KV of adapters apart: a copy without the name would serve the model itself."""
    for fake in fakes:
        fake.adapters = [ADAPTER]
    gateway = await started(Gateway(configuration(fakes, handover_timeout_s=3.0), model_folder, IMPATIENT))
    prompt = list(range(10, 90))
    fakes[1].hold_at = fakes[2].hold_at = len(prompt) + 100
    client = Client(gateway, 150, prompt=prompt, adapter=ADAPTER)
    session = await client.reached(5)
    source = next(fake for fake in fakes if session.instance is find(gateway, fake.name))
    target = fakes[2] if source is fakes[1] else fakes[1]
    record = await gateway.migrate(session, find(gateway, target.name), "test", COMMANDED, mode)  # type: ignore[arg-type]
    assert (record.outcome, record.mode) == ("moved", mode)
    fakes[1].hold_at = fakes[2].hold_at = None
    await client.finish()
    client.check(150)
    assert len(target.asked) == (2 if mode == "pre_copy" else 1)
    assert [body.get("model") for fake in fakes for body in fake.asked] == [ADAPTER] * (2 + len(target.asked))
    await gateway.stop()
