"""Placement by what is cached, over mock engines with prefix caches: turns of a chat compute what is new."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import aiohttp
import pytest

from ares.config import GatewayConfig
from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.instance import Instance, NoInstanceError
from ares.gateway.pool.prompt_blocks import PromptBlocks
from ares.gateway.service import COMMANDED, Gateway
from ares.mock_engine.instance import Instance as MockInstance
from ares.mock_engine.transfer import Puller
from ares.protocol import kv_events, messages
from ares.simulator.profile import StepTimeModel
from tests.gateway.fakes import instances
from tests.gateway.gateways import Client, configuration, sample, started
from tests.gateway.running import VOCABULARY
from tests.mock_engine.cluster import MODEL, Cluster, serving, settings
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(120)
# Prompts take long, and decode steps have room for hundreds of tokens of a prompt.
STEP = StepTimeModel(base_s=0.002, per_request_s=0, per_resident_token_s=0, per_prefill_token_s=2e-5)
BLOCK = 16


@contextlib.asynccontextmanager
async def serve(folder: Path, preset: str, *chosen: str) -> AsyncIterator[tuple[Gateway, Cluster]]:
    """Two prefill and two decode instances, and a gateway with this preset and settings of it."""
    behaviour = settings(prefix_caching=True, step=STEP)
    async with serving(behaviour, "prefill", "prefill", "decode", "decode") as cluster:
        urls = [server.url for server in cluster.servers.values()]
        config = GatewayConfig(
            model="some/model",
            workers=urls,
            preset=preset,
            settings=list(chosen),
            telemetry_interval_s=0.02,
            slo_tpot_s=0.02,
        )
        gateway = Gateway(config, folder)
        await started(gateway)
        yield gateway, cluster
        await cluster.at_rest()
        await gateway.stop()


async def ask(gateway: Gateway, prompt: list[int], name: str, tokens: int = 20, **sampling: Any) -> list[int]:
    client = Client(gateway, tokens, name=name, prompt=prompt, **sampling)
    await client.finish()
    return client.tokens


def computed(cluster: Cluster) -> int:
    """Prompt tokens that were computed, on all instances; those of outputs that were resumed too."""
    return sum(cluster.counters(name)["prompt_tokens_computed"] for name in cluster.servers)


async def decodes_on(client: Client) -> Instance:
    session = await client.reached(1)
    await eventually(lambda: session.instance is not None)
    assert session.instance is not None
    return session.instance


async def chat(gateway: Gateway, cluster: Cluster, turns: int) -> list[int]:
    """Return the prompt tokens that were computed for each turn."""
    prompt, found = [n % 200 + 3 for n in range(400)], []
    for turn in range(turns):
        before = computed(cluster)
        prompt = [*prompt, *await ask(gateway, prompt, f"turn{turn}"), *(7 + turn for _ in range(30))]
        await cluster.at_rest()
        found.append(computed(cluster) - before)
    return found


@pytest.mark.parametrize("preset", ["ares-prefix", "least-time"])
async def test_later_turns_compute_what_is_new(model_folder: Path, preset: str) -> None:
    async with serve(model_folder, preset) as (gateway, cluster):
        first, *later = await chat(gateway, cluster, 4)
        assert first <= 400 + BLOCK
        assert all(tokens <= 50 + 2 * BLOCK for tokens in later), later
        assert all(i.state.cached.lost == 0 for i in gateway.pool.instances)


@pytest.mark.parametrize(("weight", "same"), [(1, True), (0, False)])
async def test_a_turn_decodes_where_the_last_one_did_although_another_instance_is_empty(
    model_folder: Path, weight: int, same: bool
) -> None:
    chosen = (f"admission.cached_weight={weight}", "prefill.on_decode=false")
    async with serve(model_folder, "ares-prefix", *chosen) as (gateway, cluster):
        await eventually(lambda: all(instance.open for instance in gateway.pool.instances))
        prompt = [n % 200 + 3 for n in range(4000)]
        first = Client(gateway, 20, name="turn1", prompt=prompt)
        home = await decodes_on(first)
        await first.finish()
        await cluster.at_rest()
        # The other instance is empty.
        busy = asyncio.create_task(
            gateway.generate("busy", [9] * 20, Sampling({"ignore_eos": True}, 1500), AsyncMock(return_value=False))
        )
        await eventually(lambda: "busy" in gateway.sessions and gateway.sessions["busy"].instance is not None)
        session = gateway.sessions["busy"]
        if session.instance is not home:
            await eventually(lambda: session.unmovable_now() is None)
            await gateway.migrate(session, home, "test", COMMANDED)
        assert session.instance is home
        second = Client(gateway, 20, name="turn2", prompt=[*prompt, *first.tokens, 7, 8])
        assert (await decodes_on(second) is home) == same
        assert not busy.done()
        await second.finish()
        assert second.tokens
        await busy


async def test_a_preset_that_looks_at_nothing_computes_turns_again(model_folder: Path) -> None:
    async with serve(model_folder, "static-rr") as (gateway, cluster):
        assert max((await chat(gateway, cluster, 3))[1:]) > 400
        assert all(len(i.state.cached) == 0 for i in gateway.pool.instances), "no events, which would cost time"


async def test_a_salt_keeps_clients_apart(model_folder: Path) -> None:
    async with serve(model_folder, "ares-prefix") as (gateway, cluster):
        prompt = [n % 200 + 3 for n in range(400)]
        for salt in ("a", "b", None):
            await ask(gateway, prompt, f"salt {salt}", cache_salt=salt)
        assert computed(cluster) >= 3 * 400
        await ask(gateway, prompt, "again", cache_salt="b")
        await cluster.at_rest()
        assert computed(cluster) <= 3 * 400 + 4 * 2 * BLOCK


async def test_a_restarted_instance_has_nothing_cached(model_folder: Path) -> None:
    async with serve(model_folder, "ares-prefix") as (gateway, cluster):
        prompt = [n % 200 + 3 for n in range(400)]
        await ask(gateway, prompt, "first")
        held = [i for i in gateway.pool.instances if len(i.state.cached)]
        assert held
        for instance in held:
            server = cluster.servers[instance.name]
            server.stop()
            await server.start()
        await eventually(lambda: all(i.open and not len(i.state.cached) for i in held), 20)
        await ask(gateway, prompt, "second")


async def test_a_policy_that_fails_costs_no_request(model_folder: Path) -> None:
    async with serve(model_folder, "ares-prefix") as (gateway, _):

        def broken(*_: Any) -> Any:
            raise RuntimeError("a bug in the policy")

        gateway.controller.prefills.decider.policy.choose = broken  # type: ignore[method-assign]
        assert len(await ask(gateway, [5] * 40, "request")) == 20
        assert sample(gateway, "ares_controller_faults_total", part="prefill") == 1


async def test_a_request_that_can_resume_nowhere_is_no_fault(model_folder: Path) -> None:
    async with serve(model_folder, "ares-prefix") as (gateway, _):
        client = Client(gateway, 200, prompt=[5] * 40)
        await decodes_on(client)
        (session,) = gateway.sessions.values()
        everywhere = {instance.name for instance in gateway.pool.instances}
        with pytest.raises((TimeoutError, NoInstanceError)):
            async with asyncio.timeout(0.2):  # until then it waits for one to become ready
                await gateway.controller.admit(session, everywhere)
        assert sample(gateway, "ares_controller_faults_total", part="prefill") == 0
        await client.finish()


async def test_without_events_what_was_sent_counts(model_folder: Path) -> None:
    async with instances("prefill", "prefill", "decode", vocabulary=VOCABULARY) as fakes:
        # No step has room for a prompt.
        gateway = await started(Gateway(configuration(fakes, preset="ares-prefix", slo_tpot_s=1e-9), model_folder))
        for name, prompt in (("a", [5] * 100), ("b", [6] * 100), ("c", [6] * 120), ("d", [5] * 120)):
            await ask(gateway, prompt, name)
        assert [len(body["token_ids"]) for body in fakes[0].asked] == [100, 120]
        assert [body["token_ids"][0] for fake in fakes[:2] for body in fake.asked] == [5, 5, 6, 6]
        await gateway.stop()


async def test_a_wrong_index_costs_time_and_no_token(model_folder: Path) -> None:
    """All instances are thought to have everything cached, and have nothing."""
    async with serve(model_folder, "ares-prefix") as (gateway, cluster):
        prompt = [n % 200 + 3 for n in range(400)]
        for n, blocks in enumerate(i.state.cached for i in gateway.pool.instances):
            blocks.sent(PromptBlocks(None, None).hashes(prompt, [], BLOCK))
            assert len(blocks) == 400 // BLOCK, n
        told = await ask(gateway, prompt, "told")
        await cluster.at_rest()
        assert computed(cluster) >= 400, "nothing was taken from a cache that has nothing"
    async with serve(model_folder, "static-rr") as (gateway, cluster):
        assert told == await ask(gateway, prompt, "plain")


async def test_wrong_events_are_counted_and_cost_no_token(model_folder: Path) -> None:
    """Wrong block sizes, unknown parents, tokens that are none, what is no event at all, and numbers far ahead."""
    async with serve(model_folder, "ares-prefix") as (gateway, cluster):
        prompt = [n % 200 + 3 for n in range(400)]
        first = await ask(gateway, prompt, "first")
        await cluster.at_rest()
        wrong = [
            kv_events.BlockStored([1, 2], None, prompt[:8], 4, medium=kv_events.GPU),
            kv_events.BlockStored([3], 999, prompt[:BLOCK], BLOCK, medium=kv_events.GPU),
            kv_events.BlockStored([4], None, [-1] * BLOCK, BLOCK, medium=kv_events.GPU),
            kv_events.BlockRemoved([12345], kv_events.GPU),
        ]
        body = kv_events.encode(kv_events.Batch(0.0, wrong))
        for instance in gateway.pool.instances:
            blocks = instance.state.cached
            blocks.receive(messages.KvEvents(1_000_000, 1_000_000, [body]))
            assert (blocks.status["ignored_blocks"], blocks.status["lost"]) in ((4, 0), (4, 1))
        assert await ask(gateway, prompt, "again") == first
        await cluster.at_rest()
        for instance in gateway.pool.instances:
            blocks = instance.state.cached
            lost = blocks.status["lost"]
            blocks.receive(messages.KvEvents(1_000_001, 1_000_000, [b"\xff nonsense"]))
            assert blocks.status["lost"] == lost + 1
        assert await ask(gateway, prompt, "once more") == first


async def test_instances_of_other_block_sizes_and_seeds_serve_side_by_side(model_folder: Path) -> None:
    """The decode instance with larger blocks can use no prefill instance's KV, and computes its prompts itself."""
    async with aiohttp.ClientSession() as pulling, serve(model_folder, "ares-prefix") as (gateway, cluster):
        odd = cluster.servers["decode-1"]
        behaviour = settings(prefix_caching=True, step=STEP, block_size=2 * BLOCK)
        odd.stop()
        odd.make = lambda: MockInstance(odd.identity, behaviour, MODEL, Puller(pulling))
        await odd.start()
        instance = next(i for i in gateway.pool.instances if i.name == "decode-1")
        await eventually(lambda: instance.open and instance.state.cached.block_size == 2 * BLOCK, 20)
        first, *later = await chat(gateway, cluster, 4)
        assert first <= 400 + BLOCK
        assert all(tokens <= 50 + 4 * BLOCK for tokens in later), later


async def test_a_move_takes_along_what_is_cached_at_the_target(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn before has run at the target: when its successor moves there, only the rest is pulled."""
    pulled: list[int] = []
    pull = Puller.pull

    async def noted(self: Puller, source: Any, expected_s: float, *, cached: int = 0, **more: Any) -> Any:
        pulled.append(cached)
        return await pull(self, source, expected_s, cached=cached, **more)

    monkeypatch.setattr(Puller, "pull", noted)
    async with serve(model_folder, "static-rr") as (gateway, cluster):
        prompt = [n % 200 + 3 for n in range(400)]
        first = Client(gateway, 20, name="turn1", prompt=prompt)
        home = await decodes_on(first)
        await first.finish()
        await cluster.at_rest()
        sampling = Sampling({"ignore_eos": True}, 1000)
        longer = [*prompt, *first.tokens, 7, 8]
        second = asyncio.create_task(gateway.generate("turn2", longer, sampling, AsyncMock(return_value=False)))
        await eventually(lambda: "turn2" in gateway.sessions and gateway.sessions["turn2"].instance is not None)
        session = gateway.sessions["turn2"]
        assert session.instance is not home, "they go round"
        await eventually(lambda: session.unmovable_now() is None)
        pulled.clear()
        record = await gateway.migrate(session, home, "test", COMMANDED)
        assert (record.outcome, session.instance) == ("moved", home)
        assert max(pulled) >= 400
        await second
