"""A run: clients, events and watchers at the same time, then the verdict."""

import asyncio
import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from ares.local_cluster.cluster import Cluster
from ares_dev.chaos import decisions
from ares_dev.chaos.check import Judge, at_rest
from ares_dev.chaos.clients import ask
from ares_dev.chaos.clock import Clock
from ares_dev.chaos.events import EventRunner
from ares_dev.chaos.plan import Ask, Plan
from ares_dev.chaos.watch import Watch

# A stream that brings nothing for so long has hung; a reply that comes whole comes at the end of its generation.
_PATIENCE_S = 90.0
_WHOLE_S = 600.0
# Metrics that tell what the run met.
_TOLD = (
    "ares_controller_faults_total",
    "ares_implausible_predictions_total",
    "ares_output_tokens_total",
    "ares_migration_pulled_tokens_total",
    "ares_migration_precopied_tokens_total",
)
_COUNTED = (
    *("cut", "pulls", "pulls_failed", "preemptions", "pins_made", "pins_pulled", "pins_released", "pins_expired"),
    "pins_pulled_late",
)

Expected = Callable[[Ask], list[int]]


@dataclass(slots=True)
class _Load:
    """The clients: so many requests at a time, each followed by the next."""

    plan: Plan
    cluster: Cluster
    expected: Expected
    clock: Clock
    judge: Judge = field(default_factory=Judge)
    sent: int = 0
    at_once: int = 0
    samples: list[int] = field(default_factory=list)
    moments: dict[str, float] = field(default_factory=dict)

    async def run(self) -> None:
        """Send until the plan's time is over, and wait for all that was sent."""
        sampler = asyncio.create_task(self._sample())
        try:
            async with asyncio.TaskGroup() as group:
                for slot in range(self.plan.shape.streams):
                    group.create_task(self._slot(slot))
        finally:
            sampler.cancel()

    async def _slot(self, slot: int) -> None:
        port = int(self.cluster.url.rpartition(":")[2])
        turn = 0
        while True:
            one = self.plan.ask(slot, turn)
            if not self.plan.sent:
                await asyncio.sleep(one.wait_s)
            elif one.name in self.plan.sent:
                await self.clock.reach(self.plan.sent[one.name])
            else:
                return
            now = self.clock.now()
            if now >= self.plan.shape.seconds:
                return
            self.moments[one.name] = round(now, 3)
            turn += 1
            self.sent += 1
            self.at_once += 1
            try:
                patience_s = _WHOLE_S if one.client == "whole" else _PATIENCE_S
                seen = await ask(self.plan, one, port, self.cluster.settings.model, patience_s)
            finally:
                self.at_once -= 1
            self.judge.take(seen, self.expected(one))

    async def _sample(self) -> None:
        while self.clock.now() < self.plan.shape.seconds:
            await asyncio.sleep(0.5)
            self.samples.append(self.at_once)


async def play(
    cluster: Cluster, plan: Plan, expected: Expected, log: Path, said: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Carry out a plan on a running cluster, and return what happened; `violations` lists what must not have.

    The plan as it was played, with real moments, is left in the cluster's log folder (`played`). Call it on the main
    thread: it starts processes again.

    Parameters
    ----------
    expected
        Returns the tokens that a request has in an undisturbed run.
    log
        The gateway's decision log.
    said
        Told what is done.
    """
    # Not kept: a connection that the server has just closed for idling is no fault of its.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as http:
        watch = Watch(cluster, http)
        await watch.begin()
        watching = asyncio.create_task(watch.run())
        clock = Clock()
        doer = EventRunner(cluster, plan, http, clock)
        load = _Load(plan, cluster, expected, clock)
        start = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(doer.run(said))
                group.create_task(load.run())
        finally:
            doer.make_well()
            again = msgspec.structs.replace(plan, events=doer.played, sent=load.moments)
            played(cluster, plan).write_bytes(msgspec.json.encode(again))
        said(f"{time.monotonic() - start:7.1f} s  all have ended; waiting for rest")
        disturbed = any(kind.startswith(("kill", "pause", "fault die", "fault freeze")) for kind in doer.done)
        rest = await watch.rest(load.sent, disturbed=disturbed)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    judge = load.judge
    violations = [*judge.violations, *watch.owners.violations, *at_rest(rest, judge)]
    violations += [f"I7: {complaint}" for complaint in doer.complaints]
    decided, wrong = decisions.wrong(log)
    violations += wrong
    steady = load.samples[len(load.samples) // 4 :] or [0]
    return {
        "seed": plan.seed,
        "seconds": round(time.monotonic() - start, 1),
        "requests": load.sent,
        "tokens": judge.tokens,
        "streams_at_once": {"median": statistics.median(steady), "most": max(load.samples, default=0)},
        "endings": dict(sorted(judge.endings.items())),
        "done": dict(sorted(doer.done.items())),
        "decisions": decided,
        "gateway": {
            "health_ms": _milliseconds(rest.health_s),
            "open_files": {"before": rest.files[0], "after": rest.files[1]},
            "requests": dict(sorted(rest.requests.items())),
            **{name: rest.metrics[name] for name in _TOLD if name in rest.metrics},
        },
        # Of instances that were killed, what they counted before is lost.
        "engines": {
            name: sum(one[name] for one in rest.counters)
            for name in _COUNTED
            if rest.counters and name in rest.counters[0]
        },
        "violations": violations,
    }


def played(cluster: Cluster, plan: Plan) -> Path:
    """Return where the plan as it was played is written."""
    return cluster.log_folder / f"played-{plan.seed}.json"


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100)
    return {
        name: round(1000 * value, 1) for name, value in (("p50", cuts[49]), ("p99", cuts[98]), ("max", max(seconds)))
    }
