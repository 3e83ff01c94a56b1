"""Warm copies on real engines: a request that loses its instance computes its last tokens only, and they are right."""

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from ares.config import GatewayConfig
from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.delta import Delta
from ares.gateway.service import Gateway
from ares.local_cluster import cluster as local
from tests.integration.client import Client
from tests.integration.tiny_model import VOCABULARY
from tests.waiting import eventually

BLOCK, PROMPT, TOKENS = 128, 1000, 2500
SETTINGS = ["copies.link_bytes_s=1e10", "copies.memory_share=0.5", "copies.least_saved_s=0"]
_LONGEST_S = 120


class Taker:
    """Takes the tokens of one sequence."""

    def __init__(self, gateway: Gateway, name: str, tokens: int = TOKENS) -> None:
        source = random.Random(name)
        self.name, self.prompt = name, [source.randrange(3, VOCABULARY) for _ in range(PROMPT)]
        self.tokens = list[int]()
        sampling = Sampling({"temperature": 0.0, "ignore_eos": True}, tokens)
        self._gateway = gateway
        self.task = asyncio.create_task(gateway.generate(name, self.prompt, sampling, self._emit))

    async def _emit(self, batch: list[Delta]) -> bool:
        self.tokens += [token for delta in batch for token in delta.token_ids or []]
        return False

    @property
    def where(self) -> str | None:
        session = self._gateway.sessions.get(self.name)
        return session.instance.name if session is not None and session.instance is not None else None

    @property
    def copied(self) -> bool:
        """Whether all of its prompt's full blocks, and some of its output's, are elsewhere."""
        session = self._gateway.sessions.get(self.name)
        target = session.copied_to if session is not None else None
        if session is None or target is None or target is session.instance or not target.state.cached.publishes:
            return False
        return target.state.cached.leading(session.placement.block_hashes(BLOCK)) > PROMPT // BLOCK


@contextlib.asynccontextmanager
async def copying(cluster: local.Cluster, folder: Path) -> AsyncIterator[Gateway]:
    """Run a second gateway over the cluster's engines, in this process, that makes warm copies."""
    urls = [url for worker in cluster.workers for url in worker.instances.values()]
    gateway = Gateway(
        GatewayConfig(model=str(folder), workers=urls, preset="off", settings=SETTINGS, period_s=0.1), folder
    )
    await gateway.start()
    await eventually(lambda: all(i.health.healthy and i.state.hello for i in gateway.pool.instances), _LONGEST_S)
    try:
        yield gateway
    finally:
        await gateway.stop()


def counted(gateway: Gateway, name: str, **labels: str) -> float:
    return gateway.metrics.registry.get_sample_value(name, labels) or 0.0


async def until(takers: list[Taker], holds: Callable[[Taker], bool]) -> None:
    await eventually(lambda: all(holds(each) for each in takers), _LONGEST_S)


@pytest.mark.timeout(600)
async def test_a_request_that_loses_its_kv_computes_its_last_tokens_only(
    cluster: local.Cluster, client: Client, tiny_model: Path
) -> None:
    async with copying(cluster, tiny_model) as gateway:
        takers = [Taker(gateway, f"warm-{n}") for n in range(3)]
        await until(takers, lambda each: each.copied)
        # One is suspended, the others lose their instance.
        suspended, *_ = takers
        # Of two ways that take about as long, let it be the decode instances that compute.
        gateway.pool.prefill_instances[0].state.draining = True
        assert await gateway.sessions[suspended.name].suspend() == "suspended"
        await eventually(lambda: counted(gateway, "ares_resumptions_total", where="decode") == 1, _LONGEST_S)
        victim = next(each.where for each in takers if each is not suspended and each.where is not None)
        lost = [each for each in takers if each.where == victim and each.copied]
        assert lost
        survivor = next(name for name in ("decode-0", "decode-1") if name != victim)
        cached = await client.engine_metric(survivor, "vllm:prefix_cache_hits_total")
        process = next(one for one in cluster.workers if one.name == victim)
        process.popen.send_signal(signal.SIGKILL)
        await asyncio.gather(*(each.task for each in takers))
        hits = await client.engine_metric(survivor, "vllm:prefix_cache_hits_total") - cached
        assert hits >= len(lost) * (PROMPT // BLOCK + 1) * BLOCK
        # Only new blocks after the first copy: far less than the whole for each copy.
        copies = counted(gateway, "ares_warm_copies_total", outcome="copied")
        assert copies > len(takers)
        assert counted(gateway, "ares_warm_copied_tokens_total") < 2 * len(takers) * (PROMPT + TOKENS)
        await asyncio.to_thread(process.popen.wait, 120)
        cluster.restart(process)
        await eventually(lambda: all(i.open for i in gateway.pool.decode_instances), _LONGEST_S)
    whole = await asyncio.gather(*(client.complete(each.prompt, TOKENS) for each in takers))
    for each, reply in zip(takers, whole, strict=True):
        assert each.tokens == reply["choices"][0]["token_ids"]
