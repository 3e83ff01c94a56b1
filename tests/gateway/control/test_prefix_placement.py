"""Placement by what is cached, over mock engines with prefix caches: turns of a chat compute what is new."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ares.config import GatewayConfig
from ares.gateway.service import Gateway
from ares.simulator.profile import StepTimeModel
from tests.gateway.fakes import instances
from tests.gateway.gateways import Client, configuration, sample, started
from tests.gateway.running import VOCABULARY
from tests.mock_engine.cluster import Cluster, serving, settings
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(120)
# Prompts take long, and decode steps have room for hundreds of tokens of a prompt.
STEP = StepTimeModel(base_s=0.002, per_request_s=0, per_resident_token_s=0, per_prefill_token_s=2e-5)
BLOCK = 16


@contextlib.asynccontextmanager
async def serve(folder: Path, preset: str) -> AsyncIterator[tuple[Gateway, Cluster]]:
    """Two prefill and two decode instances, and a gateway with this preset."""
    behaviour = settings(prefix_caching=True, step=STEP)
    async with serving(behaviour, "prefill", "prefill", "decode", "decode") as cluster:
        urls = [server.url for server in cluster.servers.values()]
        config = GatewayConfig(
            model="some/model", workers=urls, preset=preset, telemetry_interval_s=0.02, slo_tpot_s=0.02
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


async def test_without_events_what_was_sent_counts(model_folder: Path) -> None:
    async with instances("prefill", "prefill", "decode", vocabulary=VOCABULARY) as fakes:
        # No step has room for a prompt.
        gateway = await started(Gateway(configuration(fakes, preset="ares-prefix", slo_tpot_s=1e-9), model_folder))
        for name, prompt in (("a", [5] * 100), ("b", [6] * 100), ("c", [6] * 120), ("d", [5] * 120)):
            await ask(gateway, prompt, name)
        assert [len(body["token_ids"]) for body in fakes[0].asked] == [100, 120]
        assert [body["token_ids"][0] for fake in fakes[:2] for body in fake.asked] == [5, 5, 6, 6]
        await gateway.stop()
