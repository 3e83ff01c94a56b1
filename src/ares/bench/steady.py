"""A steady load of streams whose outputs are known, for measurements under kills, drains and restarts."""

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from rich.console import Console

from ares.bench.environment import describe
from ares.bench.live import client
from ares.bench.live.client import Observed
from ares.bench.live.load import Planned
from ares.bench.percentiles import milliseconds
from ares.bench.streams import send_all
from ares.engine.defaults import local_flags
from ares.local_cluster import cluster as local

_POLL_S = 0.05
# Time limit for the restart of a worker.
_REJOIN_S = 300.0
# A stream counts as under way when it has generated, and has still to generate, at least this many tokens.
_GENERATED, _TO_COME = 8, 40


class NotComparableError(RuntimeError):
    """The cluster does not do what the measurement assumes; the message says what."""


def machine_load() -> list[float]:
    """Return the load averages: other work on the machine makes timings meaningless."""
    return [round(value, 2) for value in os.getloadavg()]


async def baseline_outputs(
    http: aiohttp.ClientSession, url: str, model: str, planned: list[Planned]
) -> dict[str, list[int]]:
    """Return the tokens of each request in a run without kills, drains and restarts.

    Raises
    ------
    NotComparableError
        One failed: there is nothing to compare with.
    """
    await client.wait_until_idle(http, url)
    seen = await send_all(http, url, model, planned)
    if failed := [f"{each.name}: {each.error}" for each in seen if each.error is not None]:
        raise NotComparableError(f"requests failed in the baseline run: {failed[0]}")
    await client.wait_until_idle(http, url)
    return {each.name: each.tokens for each in seen}


@dataclass(slots=True)
class Load:
    """Streams that are checked as they end, each followed by another one.

    Attributes
    ----------
    salted
        Whether each has a cache salt of its own, so that nothing is cached from those before it.
    running
        Those under way, by request id; times are those of `time.monotonic`.
    ended, tokens
        How many ended, and their tokens.
    failed, wrong
        What went wrong with a stream: an error, or other tokens than in the baseline.
    """

    http: aiohttp.ClientSession
    url: str
    model: str
    planned: list[Planned]
    expected: dict[str, list[int]]
    salted: bool = False
    running: dict[str, Observed] = field(default_factory=dict)
    ended: int = 0
    tokens: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    _turns: "itertools.count[int]" = field(default_factory=itertools.count)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    _stopping: bool = False
    _tasks: list["asyncio.Task[None]"] = field(default_factory=list)

    def start(self, streams: int) -> None:
        """Keep this number of streams running."""
        self._tasks = [asyncio.create_task(self._keep()) for _ in range(streams)]

    async def stop(self) -> None:
        """Wait until the running streams have ended, and start no others."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def send(self, each: Planned) -> Observed:
        """Send one request under a unique id, and check its output."""
        name = f"{each.name}.{next(self._numbers)}"
        seen = self.running[name] = Observed(name, 0.0)
        body = {**each.body, "cache_salt": name} if self.salted else each.body
        try:
            await client.send_request(self.http, self.url, self.model, Planned(name, 0.0, body), 0.0, seen)
        finally:
            del self.running[name]
        self.ended += 1
        self.tokens += len(seen.tokens)
        if seen.error is not None:
            self.failed.append(f"{name}: {seen.error}")
        elif each.name in self.expected and seen.tokens != self.expected[each.name]:
            self.wrong.append(name)
        return seen

    async def streams_under_way(self, instance: str, least: int) -> list[Observed]:
        """Wait until this number of streams is under way on an instance, and return them."""
        async with asyncio.timeout(_REJOIN_S):
            while True:
                read = await client.gateway_status(self.http, self.url)
                names = [row["id"] for row in read["requests"] if row["instance"] == instance and row["movable"]]
                found = [self.running[name] for name in names if name in self.running]
                found = [seen for seen in found if _GENERATED <= len(seen.tokens) <= self._length(seen) - _TO_COME]
                if len(found) >= least:
                    return found
                await asyncio.sleep(_POLL_S)

    def summary(self) -> dict[str, Any]:
        """Return how all streams ended."""
        return {
            "streams": self.ended,
            "output_tokens": self.tokens,
            "requests_lost": len(self.failed),
            "streams_with_other_tokens": len(self.wrong),
            "errors": self.failed[:20],
        }

    async def _keep(self) -> None:
        while not self._stopping:
            each = self.planned[next(self._turns) % len(self.planned)]
            if (await self.send(each)).error is not None:
                await asyncio.sleep(0.5)  # not a hot loop where everything fails

    def _length(self, seen: Observed) -> int:
        return len(self.expected.get(seen.name.rpartition(".")[0], ()))


def cluster_settings(
    model: str,
    decode: int,
    port: int,
    simulate: str | None,
    dtype: str,
    preset: str = "off",
    worker_flags: tuple[str, ...] = (),
) -> local.ClusterSettings:
    """Return settings for one prefill and several decode instances, real or mock, each in a separate process."""
    return local.ClusterSettings(
        model=model,
        decode=decode,
        preset=preset,
        port=port,
        worker_flags=worker_flags,
        vllm_flags=() if simulate else tuple(local_flags(["--dtype", dtype])),
        simulate=simulate,
        per_process=1,
    )


def result_header(name: str, model: str, simulate: str | None, dtype: str, decode: int) -> dict[str, Any]:
    """Return the fields that every result begins with."""
    kind = f"mock: {simulate}" if simulate else f"vLLM, {dtype}"
    return {"benchmark": name, "model": model, "engines": kind, "decode_instances": decode, **describe()}


async def instance_row(http: aiohttp.ClientSession, url: str, name: str) -> dict[str, Any]:
    """Return an instance's row of the status; an empty one while the gateway does not list it."""
    return next((row for row in (await client.gateway_status(http, url))["instances"] if row["name"] == name), {})


async def wait_for(
    http: aiohttp.ClientSession, url: str, name: str, wanted: Callable[[dict[str, Any]], bool], poll_s: float = _POLL_S
) -> float:
    """Wait until a condition on an instance's row holds; return when it did (`time.monotonic`)."""
    async with asyncio.timeout(_REJOIN_S):
        while not wanted(await instance_row(http, url, name)):  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(poll_s)
    return time.monotonic()


async def restart_worker(
    http: aiohttp.ClientSession, url: str, cluster: local.Cluster, process: local.ManagedProcess
) -> float:
    """Restart a worker that has ended; return the seconds until it takes requests.

    Raises
    ------
    ClusterError
        It does not come up, or not in time.
    """
    began = time.monotonic()
    # On the main thread: the kernel ends a child when the thread that started it ends.
    cluster.restart(process)
    while not await asyncio.to_thread(process.ready):
        cluster.check()
        if time.monotonic() - began > _REJOIN_S:
            raise local.ClusterError(
                f"{process.name} did not come back; the end of {process.log}:\n{process.log_end()}"
            )
        await asyncio.sleep(_POLL_S)
    (name,) = process.instances
    await wait_for(http, url, name, lambda seen: bool(seen.get("healthy")) and not seen["draining"])
    return time.monotonic() - began


def latency_summary(seconds: list[float]) -> dict[str, float]:
    """Return count, P50, P90 and maximum, in milliseconds."""
    return {"count": len(seconds)} | {f"{name}_ms": v for name, v in milliseconds(seconds, 50, 90, 100).items()}


def lost(figures: Mapping[str, Any]) -> bool:
    """Whether the run broke off, or lost a request, a token or a KV block."""
    return any(figures[name] for name in ("broken_off", "requests_lost", "streams_with_other_tokens", "blocks_left"))


def show_losses(figures: Mapping[str, Any]) -> None:
    """Print what `lost` looks at."""
    console = Console()
    for why in figures["broken_off"]:
        console.print(f"broken off: {why}", style="bold red", markup=False)
    console.print(
        f"{figures['streams']} streams, {figures['requests_lost']} lost, "
        f"{figures['streams_with_other_tokens']} with other tokens, {figures['blocks_left']} KV blocks left"
    )
