"""The preset `ares` over real engines: held, suspended and resumed requests write what undisturbed ones write."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ares.config import GatewayConfig
from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.delta import Delta
from ares.gateway.records.replay import replay
from ares.gateway.service import Gateway
from ares.local_cluster import cluster as local
from ares.policy.kv_layout import KvLayout
from tests.integration.client import Client
from tests.waiting import eventually

GREEDY = {"temperature": 0.0, "ignore_eos": True}
# The policy is told of this much KV: three of the long requests fit.
CAPACITY, LONG, SHORT, TOKENS = 12000, 200, 3800, 3600


@contextlib.asynccontextmanager
async def controlled(cluster: local.Cluster, folder: Path, **settings: object) -> AsyncIterator[Gateway]:
    """Run a second gateway over the cluster's engines, in this process and under the preset `ares`."""
    urls = [url for worker in cluster.workers for url in worker.instances.values()]
    config = GatewayConfig(model=str(folder), workers=urls, preset="ares", period_s=0.2, **settings)  # type: ignore[arg-type]
    gateway = Gateway(config, folder)
    await gateway.start()
    await eventually(lambda: all(i.health.healthy and i.state.hello for i in gateway.pool.instances), 60)
    try:
        yield gateway
    finally:
        await gateway.stop()


class Taker:
    """Takes the tokens of one sequence."""

    def __init__(self, gateway: Gateway, name: str, prompt: list[int], tokens: int) -> None:
        self.prompt, self.count, self.tokens = prompt, tokens, list[int]()
        work = gateway.generate(name, prompt, Sampling(GREEDY, tokens), self._emit, gateway.objective(None, 0))
        self.task = asyncio.create_task(work)

    async def _emit(self, batch: list[Delta]) -> bool:
        self.tokens += [token for delta in batch for token in delta.token_ids or []]
        return False


def prompt(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(10, 250) for _ in range(length)]


async def test_held_and_suspended_requests_lose_nothing(
    cluster: local.Cluster, client: Client, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KvLayout, "capacity_tokens", lambda *_: CAPACITY)
    log = tmp_path / "decisions.jsonl"
    settings = {"slo_ttft_s": 10.0, "slo_tpot_s": 5.0, "decision_log": log}
    for n in range(3):  # their prefill, from its cache then, is quick: the long ones must not end before it
        await client.complete(prompt(50 + n, SHORT), 1)
    async with controlled(cluster, tiny_model, **settings) as gateway:
        for _ in range(50):
            gateway.controller.snapshots.lengths.add(TOKENS)
        alone, other = gateway.pool.decode_instances
        other.state.draining = True  # two instances would not keep pace with each other
        # A token may take 5 s, so each has time to spare from its first tokens on.
        long = [Taker(gateway, f"long-{n}", prompt(n, LONG), TOKENS) for n in range(3)]

        def full() -> bool:
            """Whether a short one does not fit, and the law is known by which others may wait."""
            held = sum(s.tokens for s in gateway.sessions.values() if s.instance is alone)
            return held > CAPACITY - SHORT and alone.state.step_time.coefficients is not None

        await eventually(full, 240)
        short = [Taker(gateway, f"short-{n}", prompt(50 + n, SHORT), 30) for n in range(3)]
        async with asyncio.timeout(240):
            await asyncio.gather(*(taker.task for taker in (*long, *short)))
        assert gateway.controller.suspensions > 0
        assert gateway.controller.waiting == gateway.controller.suspended == 0
    takers = (*short, *long)
    undisturbed = await asyncio.gather(*(client.complete(taker.prompt, taker.count) for taker in takers))
    for taker, reply in zip(takers, undisturbed, strict=True):
        assert taker.tokens == reply["choices"][0]["token_ids"]
    again = replay(log, None)
    assert again.differences == []
    assert again.logged["suspend"] > 0
