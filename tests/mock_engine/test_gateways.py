"""Two gateways before one pool, all processes of their own, over mock engines: one is killed, one is terminated."""

import asyncio
import contextlib
import io
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from rich.console import Console

from ares.free_ports import free_port
from ares.local_cluster import cluster as local
from ares.mock_engine import model as mock_model
from tests.gateway.conftest import byte_tokenizer, model_folder  # noqa: F401 - fixtures
from tests.integration.client import Client
from tests.waiting import eventually_found

pytestmark = pytest.mark.timeout(480)
# Of an instance: less than all requests need in the end. And what is pinned stays so, but for the end of its gateway.
KV_TOKENS, LEASE_S = 3000, 600
REQUESTS, LENGTH = 10, 450
DEADLINE_S = 3
PROMPT = list(range(10, 60))


class Gateway(Client):
    """A gateway of its own process, and a client of it."""

    def __init__(self, http: aiohttp.ClientSession, url: str, model: str, process: local.ManagedProcess) -> None:
        super().__init__(http, url, model)
        self.process = process

    async def started(self) -> bool:
        """Whether it hears all three instances, and has had a turn."""
        assert self.process.popen.poll() is None, self.process.log_end()
        with contextlib.suppress(aiohttp.ClientError):
            healthy = sum(row["healthy"] for row in (await self.status())["instances"])
            return healthy == 3 and await self.turns() > 0
        return False

    async def turns(self) -> float:
        """Return how often it has decided moves."""
        async with self.http.get(f"{self.url}/metrics") as reply:
            lines = (await reply.text()).splitlines()
        wanted = tuple(f'ares_rebalance_decisions_total{{result="{result}"}}' for result in ("kept", "moved"))
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(wanted))

    async def refuses(self) -> bool:
        """Whether it answers that it is not ready."""
        async with self.http.get(f"{self.url}/ready") as reply:
            return reply.status == 503


class Pool:
    """A prefill and two decode instances."""

    def __init__(self, cluster: local.Cluster, http: aiohttp.ClientSession) -> None:
        self.cluster = cluster
        self.http = http
        self.instances = [url for process in cluster.processes for url in process.instances.values()]

    def gateway(self, name: str) -> Gateway:
        """Start a gateway before the pool."""
        port, model = free_port("127.0.0.1", self.cluster.ports), self.cluster.settings.model
        self.cluster.ports.append(port)
        url = f"http://127.0.0.1:{port}"
        command = ["gateway", "--model", model, "--preset", "ares", "--port", str(port), "--period-s", "0.1"]
        command += ["--shutdown-timeout-s", str(DEADLINE_S)]
        for instance in self.instances:
            command += ["--worker", instance]
        self.cluster.start(name, url, command)
        return Gateway(self.http, url, model, self.cluster.processes[-1])

    async def prefill(self, key: str) -> None:
        """Have a prompt computed and pinned, as a gateway does for a request that then waits for admission."""
        params = {"ares_key": key, "do_remote_decode": True, "do_remote_prefill": False}
        body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": 1}, "kv_transfer_params": params}
        async with self.http.post(f"{self.instances[0]}/inference/v1/generate", json=body) as reply:
            assert reply.status == 200, await reply.text()

    async def counters(self) -> list[dict[str, Any]]:
        found = []
        for url in self.instances:
            async with self.http.get(f"{url}/simulate/counters") as reply:
                found.append(await reply.json())
        return found

    async def at_rest(self) -> list[dict[str, Any]]:
        """Wait until nothing runs, waits or is pinned, and check that every request ended, and every pin once (I5)."""

        async def idle() -> list[dict[str, Any]]:
            counters = await self.counters()
            busy = ("running", "waiting", "loading", "pinned", "kv_blocks_used")
            return [] if any(c[name] for c in counters for name in busy) else counters

        counters: list[dict[str, Any]] = await eventually_found(idle)
        for c in counters:
            assert c["arrived"] == c["finished"] + c["aborted"], c
            assert c["pins_made"] == c["pins_pulled"] + c["pins_released"] + c["pins_expired"], c
        return counters


@pytest.fixture
async def pool(model_folder: Path, tmp_path: Path) -> AsyncIterator[Pool]:  # noqa: F811
    flags = ("--speed", "4", "--kv-tokens", str(KV_TOKENS), "--lease", str(LEASE_S))
    folder, profile = str(model_folder), "llama-8b-rtx4090"
    settings = local.ClusterSettings(folder, log_folder=tmp_path, simulate=profile, vllm_flags=flags)
    http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120))
    with local.workers_only(settings, Console(file=io.StringIO())) as cluster:
        cluster.start_workers()
        async with http:
            yield Pool(cluster, http)


def prompt(gateway: int, number: int) -> list[int]:
    return [10 + gateway, 10 + number, *range(20, 60)]


async def test_one_is_killed_and_the_other_is_told_to_end(pool: Pool, model_folder: Path) -> None:  # noqa: F811
    model = mock_model.load(model_folder)
    gateways = victim, survivor = pool.gateway("gateway-a"), pool.gateway("gateway-b")
    for gateway in gateways:
        # Its policy is compiled first, which on a busy machine takes minutes; one that ends instead is noticed at once.
        await eventually_found(gateway.started, 240)
    streams = [
        [gateway.stream(f"{n}-{k}", prompt(n, k), LENGTH) for k in range(REQUESTS)]
        for n, gateway in enumerate(gateways)
    ]
    await asyncio.gather(*(output.reach(20) for output, _ in streams[1][:3]))

    # One is killed while its streams run and are handed over, and KV is pinned for its requests that wait.
    name = (await victim.status())["gateway"]
    await asyncio.gather(*(pool.prefill(f"{name}/waiting/{n}") for n in range(3)))

    async def movable() -> list[dict[str, Any]]:
        return [row for row in (await victim.status())["requests"] if row["movable"]]

    async def move(row: dict[str, Any]) -> None:
        await victim.migrate(row["id"], "decode-1" if row["instance"] == "decode-0" else "decode-0")

    moves = [asyncio.create_task(move(row)) for row in await eventually_found(movable)]
    await asyncio.sleep(0.01)
    victim.process.popen.kill()
    await asyncio.gather(*moves, *(task for _, task in streams[0]), return_exceptions=True)
    assert sum(output.done for output, _ in streams[0]) < REQUESTS

    # Only its own streams have ended, nothing of them is left, and the other gateway decides alone.
    turns = await survivor.turns()
    for number, (_, task) in enumerate(streams[1]):
        output = await task
        assert output.error is None
        assert output.token_ids == model.continuation(prompt(1, number), LENGTH)
    counters = await pool.at_rest()
    assert counters[0]["pins_expired"] >= 3

    async def decides() -> bool:
        alone = {"where": "here", "holder": None, "missed_periods": 0}
        return await survivor.turns() > turns and (await survivor.status())["controller"] == alone

    await eventually_found(decides)

    # SIGTERM: what can finish in time does, the rest gets an error that says why, and new requests are refused.
    _, short = survivor.stream("short", PROMPT, 30)
    long, cut_off = survivor.stream("long", PROMPT, 1500)
    await long.reach(3)
    survivor.process.popen.send_signal(signal.SIGTERM)
    await eventually_found(survivor.refuses)
    async with pool.http.post(f"{survivor.url}/v1/completions", json=survivor.body(PROMPT, 5)) as reply:
        assert reply.status == 503
        assert int(reply.headers["retry-after"]) >= 1
    finished, ended = await short, await cut_off
    assert finished.error is None
    assert finished.token_ids == model.continuation(PROMPT, 30)
    assert ended.error is not None
    assert "before the output was complete" in ended.error["message"]
    assert ended.token_ids == model.continuation(PROMPT, 1500)[: len(ended.token_ids)]
    assert await asyncio.to_thread(survivor.process.popen.wait, 60) in (0, -signal.SIGTERM)
    await pool.at_rest()
