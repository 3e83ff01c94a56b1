"""A steady load of streams whose every token is known, for measurements of what a cluster survives."""

import asyncio
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from ares.bench.environment import describe
from ares.bench.live import client
from ares.bench.live.client import Observed
from ares.bench.live.load import Planned
from ares.bench.streams import play
from ares.engine.defaults import local_flags
from ares.local_cluster import cluster as local

_POLL_S = 0.05
# A worker that restarts is up by then, or it is a failure.
_REJOIN_S = 300.0
# A stream is in its middle with so many tokens behind it and so many ahead.
_BEHIND, _AHEAD = 8, 40


class NotComparableError(RuntimeError):
    """The cluster does not do what the measurement stands on; the message says what."""


def session() -> aiohttp.ClientSession:
    """Make an HTTP client for any number of long streams."""
    timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))


def machine_load() -> list[float]:
    """Return the load averages: timings on a machine that does something else too say little."""
    return [round(value, 2) for value in os.getloadavg()]


async def references(http: aiohttp.ClientSession, url: str, model: str, planned: list[Planned]) -> dict[str, list[int]]:
    """Return the tokens of each request, written in peace.

    Raises
    ------
    NotComparableError
        One failed: there is nothing to compare with.
    """
    await client.quiet(http, url)
    seen = await play(http, url, model, planned)
    if failed := [f"{each.name}: {each.error}" for each in seen if each.error is not None]:
        raise NotComparableError(f"requests failed before anything was done to the cluster: {failed[0]}")
    await client.quiet(http, url)
    return {each.name: each.tokens for each in seen}


@dataclass(slots=True)
class Load:
    """Streams that are checked as they end; another one starts for each.

    Attributes
    ----------
    running
        Those under way, by request id; times are those of `time.monotonic`.
    ended, tokens
        How many ended, and their tokens.
    failed, wrong
        What went wrong with a stream: an error, or other tokens than in peace.
    """

    http: aiohttp.ClientSession
    url: str
    model: str
    planned: list[Planned]
    expected: dict[str, list[int]]
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
        """Keep so many streams running."""
        self._tasks = [asyncio.create_task(self._keep()) for _ in range(streams)]

    async def stop(self) -> None:
        """Let the streams come to their ends, and start none."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def send(self, each: Planned) -> Observed:
        """Send one request under an id of its own and check what comes."""
        name = f"{each.name}.{next(self._numbers)}"
        seen = self.running[name] = Observed(name, 0.0)
        try:
            await client.one(self.http, self.url, self.model, Planned(name, 0.0, each.body), 0.0, seen)
        finally:
            del self.running[name]
        self.ended += 1
        self.tokens += len(seen.tokens)
        if seen.error is not None:
            self.failed.append(f"{name}: {seen.error}")
        elif each.name in self.expected and seen.tokens != self.expected[each.name]:
            self.wrong.append(name)
        return seen

    async def in_the_middle(self, instance: str, least: int) -> list[Observed]:
        """Wait until so many streams are in their middle on an instance, and return them."""
        async with asyncio.timeout(_REJOIN_S):
            while True:
                read = await client.status(self.http, self.url)
                names = [row["id"] for row in read["requests"] if row["instance"] == instance and row["movable"]]
                found = [self.running[name] for name in names if name in self.running]
                found = [seen for seen in found if _BEHIND <= len(seen.tokens) <= self._length(seen) - _AHEAD]
                if len(found) >= least:
                    return found
                await asyncio.sleep(_POLL_S)

    def summary(self) -> dict[str, Any]:
        """Return what became of all streams."""
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


def engines(
    model: str,
    decode: int,
    port: int,
    simulate: str | None,
    dtype: str,
    preset: str = "off",
    worker_flags: tuple[str, ...] = (),
) -> local.ClusterSettings:
    """Return one prefill and so many decode instances, each in a process of its own: real ones, or simulated."""
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


def described(name: str, model: str, simulate: str | None, dtype: str, decode: int) -> dict[str, Any]:
    """Return what a result says of itself before its figures."""
    kind = f"simulated: {simulate}" if simulate else f"vLLM, {dtype}"
    return {"benchmark": name, "model": model, "engines": kind, "decode_instances": decode, **describe()}


async def row(http: aiohttp.ClientSession, url: str, name: str) -> dict[str, Any]:
    """Return an instance's row of the status; an empty one while the gateway does not know it by name."""
    return next((row for row in (await client.status(http, url))["instances"] if row["name"] == name), {})


async def until(
    http: aiohttp.ClientSession, url: str, name: str, wanted: Callable[[dict[str, Any]], bool], poll_s: float = _POLL_S
) -> float:
    """Wait for something that an instance's row shows; return when it was seen, on the clock of `time.monotonic`."""
    async with asyncio.timeout(_REJOIN_S):
        while not wanted(await row(http, url, name)):  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(poll_s)
    return time.monotonic()


async def restarted(http: aiohttp.ClientSession, url: str, cluster: local.Cluster, part: local.Part) -> float:
    """Start a worker again that has ended; return the seconds until it takes requests.

    Raises
    ------
    ClusterError
        It does not come up, or not in time.
    """
    began = time.monotonic()
    # On the main thread: the kernel ends a child when the thread that started it ends.
    cluster.restart(part)
    while not await asyncio.to_thread(part.ready):
        cluster.check()
        if time.monotonic() - began > _REJOIN_S:
            raise local.ClusterError(f"{part.name} did not come back; the end of {part.log}:\n{part.log_end()}")
        await asyncio.sleep(_POLL_S)
    (name,) = part.instances
    await until(http, url, name, lambda seen: bool(seen.get("healthy")) and not seen["draining"])
    return time.monotonic() - began


def spread(seconds: list[float]) -> dict[str, float]:
    """Return count, P50, P90 and maximum, in milliseconds."""
    ordered = sorted(seconds)
    if not ordered:
        return {"count": 0}

    def at(share: float) -> float:
        return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)

    return {"count": len(ordered), "p50_ms": at(0.5), "p90_ms": at(0.9), "max_ms": round(1000 * ordered[-1], 1)}
