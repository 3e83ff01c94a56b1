"""Executing the events of a plan, each at its time, and undoing them."""

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
import msgspec

from ares.local_cluster.cluster import Cluster, ManagedProcess
from ares.protocol.fields import FAULTS_ROUTE
from ares_dev.chaos.clock import Clock
from ares_dev.chaos.plan import Event, Plan

# A killed process answers again within this time; real engines take long.
_RETURN_S = 300.0
_LOOK_S = 0.5
# For what an instance still does when its role changes.
_ROLE_S = 10.0
# Decode processes that a move needs.
_FOR_A_MOVE = 2
# Answers of the admin routes that say why an order cannot be carried out.
_REFUSALS = (404, 409, 503)
_UNDONE: dict[str, Any] = {
    "predictions": None,
    "telemetry": None,
    "refuse": False,
    "lose_tokens": 0.0,
    "slow": 1.0,
    "freeze_s": 0.0,
}


class EventRunner:
    """Executes the events of a plan on a cluster.

    Attributes
    ----------
    done
        What was done, by kind and outcome.
    errors
        Answers that the gateway must not give, and processes that did not come back.
    executed
        The events that were executed, with their real times and what was drawn.
    """

    def __init__(self, cluster: Cluster, plan: Plan, http: aiohttp.ClientSession, clock: Clock) -> None:
        self.done: Counter[str] = Counter()
        self.errors: list[str] = []
        self.executed: list[Event] = []
        self._cluster = cluster
        self._plan = plan
        self._http = http
        self._clock = clock
        self._workers: dict[str, ManagedProcess] = {managed.name: managed for managed in cluster.workers}
        # Processes that are not available: an event finds one only where something took longer than planned.
        self._unavailable: set[str] = set()
        self._paused: set[str] = set()

    async def run(self, report: Callable[[str], None]) -> None:
        """Execute all events, and return once all are undone and every process is back."""
        async with asyncio.TaskGroup() as group:
            for event in self._plan.events:
                group.create_task(self._at(event, report))

    async def _at(self, event: Event, report: Callable[[str], None]) -> None:
        await self._clock.reach(event.at_s)
        if event.kind != "move":
            report(f"{self._clock.now():7.1f} s  {event.kind} {event.target} {event.what}")
        work: dict[str, Callable[[Event], Coroutine[Any, Any, None]]] = {
            "move": self._move,
            "kill": self._kill,
            "pause": self._pause,
            "drain": self._drain,
            "role": self._role,
            "preset": self._preset,
            "fault": self._fault,
        }
        await work[event.kind](msgspec.structs.replace(event, at_s=round(self._clock.now(), 3)))

    def resume_paused(self) -> None:
        """Resume paused processes, whatever else fails."""
        for name in self._paused:
            self._workers[name].send(signal.SIGCONT)

    # --- the gateway's own routes ---

    async def _admin(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        url = f"{self._cluster.url}/admin/v1/{path}"
        try:
            async with self._http.request(method, url, json=body) as reply:
                read: dict[str, Any] = await reply.json()
                if reply.status != 200 and reply.status not in _REFUSALS:
                    self.errors.append(f"{method} {path} answered {reply.status}: {read}")
                return reply.status, read
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self.errors.append(f"{method} {path}: {error!r}")
            return 0, {}

    async def _move(self, event: Event) -> None:
        orders = event.orders
        if orders is None:
            _, status = await self._admin("GET", "status")
            draw = random.Random(event.draw)  # noqa: S311 - no secret
            movable = [row for row in status.get("requests", ()) if row["movable"]]
            decode = [row["name"] for row in status.get("instances", ()) if row["role"] != "prefill"]
            chosen = draw.sample(movable, min(event.count, len(movable)))
            orders = [(row["id"], draw.choice(decode)) for row in chosen]
        self.executed.append(msgspec.structs.replace(event, orders=orders))
        await asyncio.gather(*(self._order(request, target, event.what) for request, target in orders))

    async def _order(self, request: str, target: str, mode: str) -> None:
        order = {"request_id": request, "target": target, "mode": mode}
        status, record = await self._admin("POST", "migrations", order)
        self.done[f"move: {record['outcome'] if status == 200 else f'refused, {status}'}"] += 1

    async def _preset(self, event: Event) -> None:
        self.executed.append(event)
        await self._admin("PUT", "preset", {"preset": event.what})
        self.done["preset"] += 1

    async def _drain(self, event: Event) -> None:
        path = f"instances/{event.target}"
        process = self._process(event)
        if not self._claim(event, "drain"):
            return
        await self._admin("POST", f"{path}/drain", {"deadline_s": float(event.what)})
        await asyncio.sleep(event.seconds)
        await self._admin("POST", f"{path}/undrain")
        self._unavailable.discard(process)

    async def _role(self, event: Event) -> None:
        """Give an instance another role, and after a while its own again."""
        process = self._process(event)
        if not self._claim(event, f"role {event.what}"):
            return
        path, own = f"instances/{event.target}/role", event.target.split("-", maxsplit=1)[0]
        await self._admin("POST", path, {"role": event.what, "deadline_s": _ROLE_S})
        await asyncio.sleep(event.seconds)
        deadline = time.monotonic() + _RETURN_S
        while not await self._has_role(event.target, own):
            if time.monotonic() > deadline:
                self.errors.append(f"{event.target} did not become {own} again within {_RETURN_S:g} s")
                break
            # Refused for a moment where another one is just changing, or nobody else does its work.
            await self._admin("POST", path, {"role": own, "deadline_s": _ROLE_S})
            await asyncio.sleep(_LOOK_S)
        self._unavailable.discard(process)

    async def _has_role(self, name: str, role: str) -> bool:
        _, status = await self._admin("GET", "status")
        rows = [row for row in status.get("instances", ()) if row["name"] == name]
        return bool(rows) and rows[0]["role"] == role and rows[0]["next_role"] is None

    # --- processes ---

    async def _kill(self, event: Event) -> None:
        if not self._claim(event, "kill"):
            return
        managed = self._workers[event.target]
        managed.send(signal.SIGKILL)
        await asyncio.to_thread(managed.popen.wait)
        await asyncio.sleep(event.seconds)
        self._cluster.restart(managed)
        with self._clock.stopped() if self._available("decode") < _FOR_A_MOVE else contextlib.nullcontext():
            await self._await_return(managed)
        self._unavailable.discard(event.target)

    async def _pause(self, event: Event) -> None:
        if not self._claim(event, "pause"):
            return
        managed = self._workers[event.target]
        self._paused.add(event.target)
        managed.send(signal.SIGSTOP)
        await asyncio.sleep(event.seconds)
        managed.send(signal.SIGCONT)
        self._paused.discard(event.target)
        await self._await_return(managed)
        self._unavailable.discard(event.target)

    async def _await_return(self, managed: ManagedProcess) -> None:
        """Wait until all instances of a process answer, and the gateway calls them healthy."""
        deadline = time.monotonic() + _RETURN_S
        while time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)
            if managed.popen.poll() is not None:
                self.errors.append(f"{managed.name} ended with status {managed.popen.poll()} by itself")
                return
            if not await self._answers(f"{managed.url}/health"):
                continue
            _, status = await self._admin("GET", "status")
            if all(row["healthy"] for row in status.get("instances", ()) if row["name"] in managed.instances):
                return
        self.errors.append(f"{managed.name} did not come back within {_RETURN_S:g} s")

    async def _answers(self, url: str) -> bool:
        try:
            async with self._http.get(url, timeout=aiohttp.ClientTimeout(total=5)) as reply:
                return reply.status == 200
        except (aiohttp.ClientError, OSError):
            return False

    def _available(self, role: str) -> int:
        """Return how many processes of a role are available."""
        return sum(name not in self._unavailable for name in self._plan.shape.processes(role))

    def _process(self, event: Event) -> str:
        """Return the name of the process of an event: its target, or that of its target instance."""
        return event.target if event.target in self._workers else event.target.rsplit("-", 1)[0]

    def _claim(self, event: Event, kind: str) -> bool:
        """Whether enough other processes are available; if so, that of the event is not, until it is released."""
        process = self._process(event)
        role = process.split("-", maxsplit=1)[0]
        alike = self._plan.shape.processes(role)
        unavailable = len(alike) - self._available(role)
        if process in self._unavailable or unavailable + 1 > max(role == "prefill", len(alike) // 2):
            self.done[f"{kind}: left out, too few are available"] += 1
            return False
        self._unavailable.add(process)
        self.done[kind] += 1
        self.executed.append(event)
        return True

    # --- faults of mock engines, and telemetry faults of real ones ---

    async def _fault(self, event: Event) -> None:
        process = self._process(event)
        kind = f"fault {'die' if 'die' in event.what else 'freeze' if 'freeze' in event.what else event.what}"
        if event.harmless:
            self.done[kind] += 1
            self.executed.append(event)
        elif not self._claim(event, kind):
            return
        # Faults of a real engine are injected into the gateway, which changes its telemetry (gateway.py).
        simulated = self._plan.shape.simulated
        url = self._workers[process].instances[event.target] if simulated else self._cluster.url
        await self._inject(event, f"{url}{FAULTS_ROUTE}{'' if simulated else f'/{event.target}'}")
        if not event.harmless:
            self._unavailable.discard(process)

    async def _inject(self, event: Event, url: str) -> None:
        await self._post_fault(url, event.what)
        await asyncio.sleep(event.seconds)
        deadline = time.monotonic() + _RETURN_S
        while not await self._post_fault(url, msgspec.json.encode(_UNDONE).decode()):
            if time.monotonic() > deadline:
                self.errors.append(f"{event.target} did not come back within {_RETURN_S:g} s")
                return
            await asyncio.sleep(_LOOK_S)

    async def _post_fault(self, url: str, body: str) -> bool:
        try:
            timeout = aiohttp.ClientTimeout(total=20)
            async with self._http.post(url, data=body, timeout=timeout) as reply:
                if reply.status != 200:
                    self.errors.append(f"{FAULTS_ROUTE} answered {reply.status}: {await reply.text()}")
                return True
        except (aiohttp.ClientError, OSError):
            return False
