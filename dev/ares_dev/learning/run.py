"""Requests against a learning cluster, and what its learner reports meanwhile."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

from ares.bench import sse
from ares.bench.live import client
from ares.bench.live.client import Observed
from ares.bench.live.load import Planned
from ares.bench.percentiles import milliseconds, percentiles
from ares.local_cluster import cluster as local
from ares_dev.learning.traffic import Phase, arrivals

_SAMPLE_S = 5.0
_SILENCE_S = 300.0
_LEARNER = "learner"


@dataclass(slots=True)
class Learned:
    """What a run has shown; times in seconds from its start, on the clock of the gateway's host.

    Attributes
    ----------
    requests
        Each with the name of its phase.
    samples
        Every 5 s: preemptions so far, and the version that each instance runs.
    losses, events
        As the learner reported them.
    learner_cpu_s
        CPU time of the learner and its jobs.
    """

    requests: list[tuple[str, Observed]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    losses: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    learner_cpu_s: float = 0.0
    span_s: float = 0.0

    def swapped_at(self) -> list[tuple[float, str]]:
        """Return when all instances ran another version than before, and which; empty: the curve."""
        found: list[tuple[float, str]] = []
        for sample in self.samples:
            versions = set(sample["versions"].values())
            if len(versions) == 1 and (version := versions.pop()) != (found[-1][1] if found else ""):
                found.append((sample["at_s"], version))
        return found


class _Watch:
    """Samples the cluster and its learner, and keeps what is new in the learner's reports."""

    def __init__(self, http: aiohttp.ClientSession, cluster: local.Cluster, learned: Learned, start: float) -> None:
        self._http = http
        self._cluster = cluster
        self._learned = learned
        self._start = start
        self._wall = time.time() - (time.monotonic() - start)
        self._seen: set[str] = set()
        self._cpu: dict[int, float] = {}

    async def run(self) -> None:
        while True:
            try:
                await self.sample()
            except (aiohttp.ClientError, TimeoutError) as error:
                self._learned.samples.append({"at_s": self._now(), "error": repr(error), "versions": {}})
            await asyncio.sleep(_SAMPLE_S)

    async def sample(self) -> None:
        read = await client.gateway_status(self._http, self._cluster.url)
        decode = [row for row in read["instances"] if row["role"] != "prefill"]
        self._learned.samples.append(
            {
                "at_s": self._now(),
                "preemptions": sum(row.get("preemptions", 0) for row in decode),
                "running": sum(row.get("running", 0) for row in decode),
                "versions": {row["name"]: row["predictor"] for row in decode if "predictor" in row},
            }
        )
        self._count_cpu()
        for report in read["learners"]:
            self._keep("losses", report["losses"])
            self._keep("events", report["events"])

    def _keep(self, name: str, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            if (key := f"{name} {sorted(entry.items(), key=str)}") not in self._seen:
                self._seen.add(key)
                getattr(self._learned, name).append({**entry, "at_s": round(entry["time"] - self._wall, 1)})

    def _count_cpu(self) -> None:
        """Add up the CPU time of the learner's processes; one that has ended keeps what it had when it was seen."""
        for process in self._cluster.processes:
            if process.name != _LEARNER:
                continue
            try:
                own = psutil.Process(process.popen.pid)
                for each in (own, *own.children(recursive=True)):
                    times = each.cpu_times()
                    self._cpu[each.pid] = times.user + times.system
            except psutil.NoSuchProcess:
                continue
        self._learned.learner_cpu_s = round(sum(self._cpu.values()), 1)

    def _now(self) -> float:
        return round(time.monotonic() - self._start, 1)


async def run(
    cluster: local.Cluster, phases: Sequence[Phase], seed: int, show: Callable[[float, Learned], None]
) -> Learned:
    """Send all phases, and return what was seen; `show` is called every second with the time."""
    learned = Learned()
    async with sse.session(_SILENCE_S) as http:
        await client.wait_until_idle(http, cluster.url)
        start = time.monotonic() + 0.5
        watch = _Watch(http, cluster, learned, start)
        watcher = asyncio.create_task(watch.run())

        async def send(phase: Phase, planned: Planned) -> None:
            seen = await client.send_request(http, cluster.url, cluster.settings.model, planned, start)
            learned.requests.append((phase.name, seen))

        try:
            async with asyncio.TaskGroup() as tasks:
                for phase, planned in arrivals(phases, seed):
                    while (wait := start + planned.at_s - time.monotonic()) > 0:
                        cluster.check()
                        show(time.monotonic() - start, learned)
                        await asyncio.sleep(min(wait, 1.0))
                    tasks.create_task(send(phase, planned))
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
        await watch.sample()
    learned.span_s = round(time.monotonic() - start, 1)
    return learned


def parts(learned: Learned, phases: Sequence[Phase]) -> list[tuple[str, float, float]]:
    """Return the parts of a run that are compared, with their ends: each phase, cut where all instances had swapped."""
    found, begins, runs = [], 0.0, "curve"
    swaps = learned.swapped_at()
    for phase in phases:
        ends = begins + phase.seconds
        for at, version in swaps:
            if begins < at < ends:
                found.append((f"{phase.name}, {runs}", begins, at))
                begins, runs = at, version[:8] or "curve"
        found.append((f"{phase.name}, {runs}", begins, ends))
        begins = ends
    return found


def figures(learned: Learned, low: float, high: float, slo_tpot_s: float) -> dict[str, Any]:
    """Return what clients saw of the requests that arrived in a part of the run, and its preemptions."""
    seen = [one for _, one in learned.requests if low <= one.at_s < high]
    ended = [one for one in seen if one.error is None]
    several = [one for one in ended if len(one.tokens) > 1]
    counts = [
        sample["preemptions"] for sample in learned.samples if low <= sample["at_s"] < high and "preemptions" in sample
    ]
    minutes = max(1e-9, (high - low) / 60)
    return {
        "from_s": low,
        "to_s": high,
        "requests": len(seen),
        "failed": len(seen) - len(ended),
        "output_tokens": percentiles([len(one.tokens) for one in ended], 50, 90, 99, 100),
        "ttft_ms": milliseconds([one.ttft_s for one in ended], 50, 99),
        "tpot_ms": milliseconds([one.tpot_s for one in several], 50, 90, 99),
        "longest_gap_ms": milliseconds([one.longest_gap_s for one in several], 50, 99, 100),
        "preemptions_per_minute": round((counts[-1] - counts[0]) / minutes, 2) if counts else 0.0,
        "within_slo_per_minute": round(sum(one.tpot_s <= slo_tpot_s for one in ended) / minutes, 2),
    }
