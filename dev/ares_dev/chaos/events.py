"""Doing what the plan says, each event at its moment, and undoing it."""

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

from ares.local_cluster.cluster import Cluster, Part
from ares.protocol.fields import FAULTS_ROUTE
from ares_dev.chaos.clock import Clock
from ares_dev.chaos.plan import Event, Plan

# A process that was killed answers again within this time; real engines take long.
_RETURN_S = 300.0
_LOOK_S = 0.5
# Decode processes that a move needs.
_FOR_A_MOVE = 2
# Answers of the admin routes that say why an order cannot be carried out.
_REFUSALS = (404, 409, 503)
_UNDONE: dict[str, Any] = {"predictions": None, "telemetry": None, "refuse": False, "slow": 1.0, "freeze_s": 0.0}


class EventRunner:
    """Carries out the events of a plan on a cluster.

    Attributes
    ----------
    done
        What was done, by kind and outcome.
    complaints
        What the gateway must not have answered.
    played
        The events that were carried out, with their real moments and what was drawn.
    """

    def __init__(self, cluster: Cluster, plan: Plan, http: aiohttp.ClientSession, clock: Clock) -> None:
        self.done: Counter[str] = Counter()
        self.complaints: list[str] = []
        self.played: list[Event] = []
        self._cluster = cluster
        self._plan = plan
        self._http = http
        self._clock = clock
        self._parts: dict[str, Part] = {part.name: part for part in cluster.workers}
        # Processes that are not well: an event finds them so only where something took longer than planned.
        self._ill: set[str] = set()
        self._paused: set[str] = set()

    async def run(self, said: Callable[[str], None]) -> None:
        """Do everything, and return once all is undone and every process is back."""
        async with asyncio.TaskGroup() as group:
            for event in self._plan.events:
                group.create_task(self._at(event, said))

    async def _at(self, event: Event, said: Callable[[str], None]) -> None:
        await self._clock.reach(event.at_s)
        if event.kind != "move":
            said(f"{self._clock.now():7.1f} s  {event.kind} {event.target} {event.what}")
        work: dict[str, Callable[[Event], Coroutine[Any, Any, None]]] = {
            "move": self._move,
            "kill": self._kill,
            "pause": self._pause,
            "drain": self._drain,
            "preset": self._preset,
            "fault": self._fault,
        }
        await work[event.kind](msgspec.structs.replace(event, at_s=round(self._clock.now(), 3)))

    def make_well(self) -> None:
        """Let whatever is stopped go on, whatever else fails."""
        for name in self._paused:
            self._parts[name].send(signal.SIGCONT)

    # --- the gateway's own routes ---

    async def _admin(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        url = f"{self._cluster.url}/admin/v1/{path}"
        try:
            async with self._http.request(method, url, json=body) as reply:
                read: dict[str, Any] = await reply.json()
                if reply.status != 200 and reply.status not in _REFUSALS:
                    self.complaints.append(f"{method} {path} answered {reply.status}: {read}")
                return reply.status, read
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self.complaints.append(f"{method} {path}: {error!r}")
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
        self.played.append(msgspec.structs.replace(event, orders=orders))
        await asyncio.gather(*(self._order(request, target, event.what) for request, target in orders))

    async def _order(self, request: str, target: str, mode: str) -> None:
        order = {"request_id": request, "target": target, "mode": mode}
        status, record = await self._admin("POST", "migrations", order)
        self.done[f"move: {record['outcome'] if status == 200 else f'refused, {status}'}"] += 1

    async def _preset(self, event: Event) -> None:
        self.played.append(event)
        await self._admin("PUT", "preset", {"preset": event.what})
        self.done["preset"] += 1

    async def _drain(self, event: Event) -> None:
        path = f"instances/{event.target}"
        process = self._process(event)
        if not self._take(event, "drain"):
            return
        await self._admin("POST", f"{path}/drain", {"deadline_s": float(event.what)})
        await asyncio.sleep(event.seconds)
        await self._admin("POST", f"{path}/undrain")
        self._ill.discard(process)

    # --- processes ---

    async def _kill(self, event: Event) -> None:
        if not self._take(event, "kill"):
            return
        part = self._parts[event.target]
        part.send(signal.SIGKILL)
        await asyncio.to_thread(part.process.wait)
        await asyncio.sleep(event.seconds)
        self._cluster.restart(part)
        with self._clock.held() if self._well("decode") < _FOR_A_MOVE else contextlib.nullcontext():
            await self._returned(part)
        self._ill.discard(event.target)

    async def _pause(self, event: Event) -> None:
        if not self._take(event, "pause"):
            return
        part = self._parts[event.target]
        self._paused.add(event.target)
        part.send(signal.SIGSTOP)
        await asyncio.sleep(event.seconds)
        part.send(signal.SIGCONT)
        self._paused.discard(event.target)
        await self._returned(part)
        self._ill.discard(event.target)

    async def _returned(self, part: Part) -> None:
        """Wait until all instances of a process answer, and the gateway takes them for well."""
        deadline = time.monotonic() + _RETURN_S
        while time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)
            if part.process.poll() is not None:
                self.complaints.append(f"{part.name} ended with status {part.process.poll()} by itself")
                return
            if not await self._answers(f"{part.url}/health"):
                continue
            _, status = await self._admin("GET", "status")
            if all(row["healthy"] for row in status.get("instances", ()) if row["name"] in part.instances):
                return
        self.complaints.append(f"{part.name} did not come back within {_RETURN_S:g} s")

    async def _answers(self, url: str) -> bool:
        try:
            async with self._http.get(url, timeout=aiohttp.ClientTimeout(total=5)) as reply:
                return reply.status == 200
        except (aiohttp.ClientError, OSError):
            return False

    def _well(self, role: str) -> int:
        """Return how many processes of a role are well."""
        return sum(name not in self._ill for name in self._plan.shape.processes(role))

    def _process(self, event: Event) -> str:
        """Return the name of the process that an event befalls, or that of its instance."""
        return event.target if event.target in self._parts else event.target.rsplit("-", 1)[0]

    def _take(self, event: Event, kind: str) -> bool:
        """Whether enough others are well; then its process is not, until it is taken back."""
        process = self._process(event)
        role = process.split("-", maxsplit=1)[0]
        alike = self._plan.shape.processes(role)
        ill = len(alike) - self._well(role)
        if process in self._ill or ill + 1 > max(role == "prefill", len(alike) // 2):
            self.done[f"{kind}: left out, too few are well"] += 1
            return False
        self._ill.add(process)
        self.done[kind] += 1
        self.played.append(event)
        return True

    # --- faults of simulated engines, and lies about real ones ---

    async def _fault(self, event: Event) -> None:
        process = self._process(event)
        kind = f"fault {'die' if 'die' in event.what else 'freeze' if 'freeze' in event.what else event.what}"
        if event.harmless:
            self.done[kind] += 1
            self.played.append(event)
        elif not self._take(event, kind):
            return
        # A real engine does not lie: the gateway changes what it hears of it (gateway.py).
        simulated = self._plan.shape.simulated
        url = self._parts[process].instances[event.target] if simulated else self._cluster.url
        await self._lie(event, f"{url}{FAULTS_ROUTE}{'' if simulated else f'/{event.target}'}")
        if not event.harmless:
            self._ill.discard(process)

    async def _lie(self, event: Event, url: str) -> None:
        await self._tell(url, event.what)
        await asyncio.sleep(event.seconds)
        deadline = time.monotonic() + _RETURN_S
        while not await self._tell(url, msgspec.json.encode(_UNDONE).decode()):
            if time.monotonic() > deadline:
                self.complaints.append(f"{event.target} did not come back within {_RETURN_S:g} s")
                return
            await asyncio.sleep(_LOOK_S)

    async def _tell(self, url: str, body: str) -> bool:
        try:
            timeout = aiohttp.ClientTimeout(total=20)
            async with self._http.post(url, data=body, timeout=timeout) as reply:
                if reply.status != 200:
                    self.complaints.append(f"{FAULTS_ROUTE} answered {reply.status}: {await reply.text()}")
                return True
        except (aiohttp.ClientError, OSError):
            return False
