"""A run of a plan: clients, events and watchers at the same time, then the checks."""

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

from ares.bench.percentiles import milliseconds
from ares.local_cluster.cluster import Cluster
from ares_dev.chaos import decisions
from ares_dev.chaos.clients import send
from ares_dev.chaos.clock import Clock
from ares_dev.chaos.events import EventRunner
from ares_dev.chaos.invariants import RequestChecker, check_final_state
from ares_dev.chaos.plan import Plan, RequestPlan
from ares_dev.chaos.watch import Watch

# A stream that brings nothing for so long has hung; a reply that comes whole comes at the end of its generation.
_SILENCE_S = 90.0
_WHOLE_REPLY_S = 600.0
# Metrics of the gateway that go into the result.
_METRICS = (
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

Expected = Callable[[RequestPlan], list[int]]


@dataclass(slots=True)
class _Load:
    """The clients: a fixed number of concurrent requests, each followed by the next."""

    plan: Plan
    cluster: Cluster
    expected: Expected
    clock: Clock
    checker: RequestChecker = field(default_factory=RequestChecker)
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
            one = self.plan.request(slot, turn)
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
                silence_s = _WHOLE_REPLY_S if one.client == "whole" else _SILENCE_S
                seen = await send(self.plan, one, port, self.cluster.settings.model, silence_s)
            finally:
                self.at_once -= 1
            self.checker.check(seen, self.expected(one))

    async def _sample(self) -> None:
        while self.clock.now() < self.plan.shape.seconds:
            await asyncio.sleep(0.5)
            self.samples.append(self.at_once)


async def run_plan(
    cluster: Cluster, plan: Plan, expected: Expected, log: Path, report: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Execute a plan on a running cluster, and return what happened; `violations` lists the broken invariants.

    The plan as it was executed, with real times, is written to `executed_plan_file`. Call it on the main thread: it
    restarts processes.

    Parameters
    ----------
    expected
        Returns the tokens that a request has in an undisturbed run.
    log
        The gateway's decision log.
    report
        Called with a line for each event.
    """
    # No connection is kept: one that the server has just closed as idle would look like a failure.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as http:
        watch = Watch(cluster, http)
        await watch.begin()
        watching = asyncio.create_task(watch.run())
        clock = Clock()
        runner = EventRunner(cluster, plan, http, clock)
        load = _Load(plan, cluster, expected, clock)
        start = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(runner.run(report))
                group.create_task(load.run())
        finally:
            runner.resume_paused()
            again = msgspec.structs.replace(plan, events=runner.executed, sent=load.moments)
            executed_plan_file(cluster, plan).write_bytes(msgspec.json.encode(again))
        report(f"{time.monotonic() - start:7.1f} s  all requests have ended; waiting until the cluster is idle")
        disturbed = any(kind.startswith(("kill", "pause", "fault die", "fault freeze")) for kind in runner.done)
        final = await watch.final_state(load.sent, disturbed=disturbed)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    checker = load.checker
    violations = [*checker.violations, *watch.ownership.violations, *check_final_state(final, checker)]
    violations += [f"I7: {error}" for error in runner.errors]
    decided, wrong = decisions.check_decisions(log)
    violations += wrong
    steady = load.samples[len(load.samples) // 4 :] or [0]
    return {
        "seed": plan.seed,
        "seconds": round(time.monotonic() - start, 1),
        "requests": load.sent,
        "tokens": checker.tokens,
        "streams_at_once": {"median": statistics.median(steady), "most": max(load.samples, default=0)},
        "outcomes": dict(sorted(checker.outcomes.items())),
        "done": dict(sorted(runner.done.items())),
        "decisions": decided,
        "gateway": {
            "health_ms": milliseconds(final.health_s, 50, 99, 100),
            "open_files": {"before": final.files[0], "after": final.files[1]},
            "requests": dict(sorted(final.requests.items())),
            **{name: final.metrics[name] for name in _METRICS if name in final.metrics},
        },
        # The counters of a killed instance start again at zero.
        "engines": {
            name: sum(one[name] for one in final.counters)
            for name in _COUNTED
            if final.counters and name in final.counters[0]
        },
        "violations": violations,
    }


def executed_plan_file(cluster: Cluster, plan: Plan) -> Path:
    """Return the file for the plan as it was executed."""
    return cluster.log_folder / f"executed-{plan.seed}.json"
