"""Watching a run from outside: the gateway's health, which instance generates for a request, the state at the end."""

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
import psutil
from prometheus_client.parser import text_string_to_metric_families

from ares.local_cluster.cluster import Cluster
from ares.protocol.fields import COUNTERS_ROUTE
from ares_dev.chaos.invariants import EXTRA_FILES, FinalState, OwnershipChecker
from ares_dev.chaos.observe import Observer

_PROBE_S = 0.25
# A lease of 30 s may have to expire, and instances that were killed last must report again.
_IDLE_TIMEOUT_S = 75.0
# Idle connections to instances are kept for a minute.
_FILES_S = 75.0
_BUSY = ("running", "waiting", "pinned", "kv_blocks_used", "sessions")


@dataclass(slots=True)
class Watch:
    """Watches a cluster for as long as `run` runs."""

    cluster: Cluster
    http: aiohttp.ClientSession
    ownership: OwnershipChecker = field(default_factory=OwnershipChecker)
    health_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    files: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    # Of real engines; mock engines have a route for their counters.
    observers: list[Observer] = field(default_factory=list)

    async def begin(self) -> None:
        """Record open files and counters before the run."""
        if self.cluster.settings.simulate is None:
            urls = [pair for process in self.cluster.workers for pair in process.instances.items()]
            self.observers = [Observer(name, url, self.http) for name, url in urls]
        self.files = self._open_files()
        _, self.requests = await self._metrics()

    async def run(self) -> None:
        """Watch until cancelled."""
        await asyncio.gather(self._probe(), self._check_ownership(), *(observer.run() for observer in self.observers))

    async def final_state(self, sent: int, *, disturbed: bool) -> FinalState:
        """Wait until nothing is left, or for long enough, and return what is left."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_IDLE_TIMEOUT_S):
                while await self._busy():  # noqa: ASYNC110 - nothing announces it
                    await asyncio.sleep(_PROBE_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FILES_S):
                while self._open_files() > self.files + EXTRA_FILES:  # noqa: ASYNC110 - likewise
                    await asyncio.sleep(_PROBE_S)
        metrics, requests = await self._metrics()
        simulated = self.cluster.settings.simulate is not None
        strict = [process for process in self.cluster.processes if simulated or process.name == "gateway"]
        counters = [one for one in await self._counters() if one is not None]
        counted = await asyncio.gather(*(observer.counted() for observer in self.observers))
        named = {observer.name: more for observer, more in zip(self.observers, counted, strict=True)}
        reporting = {one["name"] for one in counters}
        return FinalState(
            counters=[one | named.get(one["name"], {}) for one in counters],
            silent=[name for process in self.cluster.workers for name in process.instances if name not in reporting],
            malformed=[what for observer in self.observers for what in observer.malformed],
            status=await self._get(f"{self.cluster.url}/admin/v1/status"),
            metrics=metrics,
            requests=requests - self.requests,
            health_s=self.health_s,
            health_failures=self.failures,
            files=(self.files, self._open_files()),
            logs={process.name: process.log.read_text(errors="replace") for process in strict},
            sent=sent,
            disturbed=disturbed,
            died=[process.name for process in self.cluster.processes if process.popen.poll() is not None],
        )

    async def _probe(self) -> None:
        while True:
            begun = time.monotonic()
            try:
                async with self.http.get(
                    f"{self.cluster.url}/health", timeout=aiohttp.ClientTimeout(total=30)
                ) as reply:
                    if reply.status != 200:
                        self.failures.append(f"answered {reply.status}")
            except (aiohttp.ClientError, OSError) as error:
                self.failures.append(repr(error))
            self.health_s.append(time.monotonic() - begun)
            await asyncio.sleep(_PROBE_S)

    async def _check_ownership(self) -> None:
        while True:
            await asyncio.sleep(4 * _PROBE_S)
            found = [one for one in await self._counters() if one is not None]
            self.ownership.check(time.monotonic(), {one["name"]: one["generating"] for one in found})

    async def _busy(self) -> bool:
        status = await self._get(f"{self.cluster.url}/admin/v1/status")
        rows = status["instances"]
        if status["requests"] or any(not r["healthy"] or r["draining"] or any(r.get(n) for n in _BUSY) for r in rows):
            return True
        counters = await self._counters()
        return any(one is None or any(one[name] for name in _BUSY[:-1]) for one in counters)

    async def _counters(self) -> list[dict[str, Any] | None]:
        """Return the counters of every instance; None for one that does not answer."""
        if self.observers:
            return [observer.counters() for observer in self.observers]
        urls = [url for process in self.cluster.workers for url in process.instances.values()]

        async def one(url: str) -> dict[str, Any] | None:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                return await self._get(f"{url}{COUNTERS_ROUTE}", 2.0)
            return None

        return list(await asyncio.gather(*map(one, urls)))

    async def _get(self, url: str, timeout_s: float = 60.0) -> dict[str, Any]:
        async with self.http.get(url, timeout=aiohttp.ClientTimeout(total=timeout_s)) as reply:
            reply.raise_for_status()
            read: dict[str, Any] = msgspec.json.decode(await reply.read())
            return read

    async def _metrics(self) -> tuple[dict[str, float], Counter[str]]:
        async with self.http.get(f"{self.cluster.url}/metrics") as reply:
            text = await reply.text()
        plain: dict[str, float] = {}
        requests: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "ares_requests_total":
                    requests[sample.labels["outcome"]] += int(sample.value)
                elif not sample.name.endswith(("_bucket", "_created")):
                    plain[sample.name] = plain.get(sample.name, 0.0) + sample.value
        return plain, requests

    def _open_files(self) -> int:
        return psutil.Process(self.cluster.processes[-1].popen.pid).num_fds()
