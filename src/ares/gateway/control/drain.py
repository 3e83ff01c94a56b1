"""Draining instances: requests that can move are moved, a few at a time; at the deadline the others are aborted there.

Each gateway moves its own requests, also where another one has ordered the drain: the instance reports it to every
gateway, deadline included. An instance that leaves this gateway's pool is emptied in the same way, and then forgotten.
So is one that is to decode no more (control/roles.py), except that nothing is aborted there.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, Protocol

from ares.gateway.control.closing import Closing, ClosingError
from ares.gateway.control.controller import Controller
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import Pool
from ares.gateway.records.metrics import Metrics
from ares.gateway.session.handover import MigrationRecord, NotMovableError
from ares.gateway.session.precopy import WantedMode
from ares.gateway.session.session import Session
from ares.gateway.tuning import DEFAULT, Tuning
from ares.policy.transfer import PRE_COPY

logger = logging.getLogger(__name__)

DRAIN = "drain"
ROLE = "role"
_REASONS = {DRAIN: "drain of", ROLE: "change of role of"}


class _Gateway(Protocol):
    """The part of the gateway that is needed to empty an instance."""

    pool: Pool
    metrics: Metrics
    controller: Controller
    closing: Closing

    @property
    def sessions(self) -> Mapping[str, Session]: ...

    def takes(self, session: Session, target: Instance) -> bool: ...

    def migrate(
        self, session: Session, target: Instance, reason: str, trigger: str, mode: WantedMode
    ) -> Coroutine[Any, Any, MigrationRecord]: ...


class Drainer:
    """Empties the instances that drain.

    Parameters
    ----------
    gateway
        Knows the instances and the sessions, and moves them.
    spawn
        Runs a coroutine in the background of the gateway.
    tuning
        The gateway's times and limits.
    """

    def __init__(
        self,
        gateway: _Gateway,
        spawn: Callable[[Coroutine[Any, Any, Any]], object],
        tuning: Tuning = DEFAULT,
    ) -> None:
        self._gateway = gateway
        self._tuning = tuning
        self._spawn = spawn
        # When requests were last aborted there.
        self._evicted_at: dict[Instance, float] = {}
        # By the session's id: where it is moved from, and when a move was tried last.
        self._moving: dict[str, Instance] = {}
        self._tried: dict[str, float] = {}

    async def order(self, instance: Instance, deadline_s: float) -> None:
        """Drain an instance; ClosingError where it is the last open one of its kind, or another gateway decides."""
        if not instance.open:  # no work is taken from anybody
            await self.drain(instance, deadline_s)
            return
        self._check_not_last(instance)
        async with self._gateway.closing.turn():
            self._check_not_last(instance)  # by what has come meanwhile
            await self.drain(instance, deadline_s)

    def _check_not_last(self, instance: Instance) -> None:
        if (why := self._gateway.pool.lost_without(instance)) is not None:
            message = f'{instance.name} is {why}; drain it nevertheless with --force (in the API, "force": true)'
            raise ClosingError(409, "last_instance", message)

    async def drain(self, instance: Instance, deadline_s: float) -> None:
        """Close an instance, whatever is left without it, and begin to empty it."""
        logger.info("%s is draining; deadline %g s", instance.name, deadline_s)
        await instance.drain(deadline_s)

    async def undrain(self, instance: Instance) -> None:
        """Put a drained instance back into service."""
        await instance.undrain()

    def left(self, instance: Instance) -> int:
        """Return how many requests are still there, those of other gateways and KV that waits to be pulled included."""
        ours = sum(1 for _ in self._on(instance))
        return max(ours, instance.state.telemetry.left if instance.state.telemetry is not None else 0)

    async def run(self) -> None:
        """Empty the instances that drain, until cancelled."""
        while True:
            await asyncio.sleep(self._tuning.drain_period_s)
            for instance in self._gateway.pool.instances:
                if instance.closing or _decodes_wrongly(instance):
                    try:
                        self._empty(instance)
                    except Exception:  # only this attempt fails, not the service (I7)
                        logger.exception("cannot empty %s", instance.name)
                        self._gateway.metrics.faults.labels(DRAIN).inc()
                if not instance.closing:
                    self._evicted_at.pop(instance, None)
            for instance in self._gateway.pool.leaving:
                if not self._needed(instance):
                    self._evicted_at.pop(instance, None)
                    self._gateway.pool.forget(instance)

    def _needed(self, instance: Instance) -> bool:
        """Whether an instance that leaves still does something, or keeps KV that may be ours until the deadline."""
        sessions = self._gateway.sessions.values()
        if any(s.works_on(instance) or s.incoming is instance for s in sessions):
            return True
        load = instance.state.telemetry if instance.health.healthy else None
        return load is not None and load.pinned > 0 and time.monotonic() < instance.leave_by

    def _on(self, instance: Instance) -> Iterator[Session]:
        return (s for s in self._gateway.sessions.values() if s.works_on(instance))

    def _empty(self, instance: Instance) -> None:
        now = time.monotonic()
        if instance.empty_by is not None and now > instance.empty_by:
            self._evict(instance, now)
            return
        room = self._tuning.drain_moves - sum(1 for source in self._moving.values() if source is instance)
        self._tried = {name: at for name, at in self._tried.items() if now - at < self._tuning.drain_retry_s}
        for session in self._on(instance):
            if room <= 0:
                return
            known = session.id in self._moving or session.id in self._tried or session.instance is not instance
            if not known and session.unmovable_now() is None:
                room -= 1
                self._moving[session.id] = instance
                self._spawn(self._try_to_migrate(session, instance))

    def _evict(self, instance: Instance, now: float) -> None:
        """Abort our requests there, and again those that have come since."""
        if now - self._evicted_at.get(instance, float("-inf")) < self._tuning.drain_retry_s:
            return
        self._evicted_at[instance] = now
        for session in self._on(instance):
            logger.info("%s leaves %s at the deadline", session.id, instance.name)
            session.abort_on(instance)

    async def _try_to_migrate(self, session: Session, source: Instance) -> None:
        outcome, trigger = "no room elsewhere", DRAIN if source.closing else ROLE
        try:
            if (target := await self._target(session)) is not None:
                reason = f"{_REASONS[trigger]} {source.name}"
                record = await self._gateway.migrate(session, target, reason, trigger, PRE_COPY)
                outcome = record.outcome
        except NotMovableError as refusal:  # it has ended, or is under way already
            outcome = refusal.reason
        finally:
            del self._moving[session.id]
            self._tried[session.id] = time.monotonic()
            logger.info("%s %s: %s: %s", _REASONS[trigger], source.name, session.id, outcome)

    async def _target(self, session: Session) -> Instance | None:
        """Return the instance that dispatch chooses, of those that have room for it; None where none has."""
        refused: set[str] = set()
        while (target := await self._gateway.controller.choose_decode(session, refused)) is not None:
            if self._gateway.takes(session, target):
                return target
            if target.name in refused:
                return None
            refused.add(target.name)
        return None


def _decodes_wrongly(instance: Instance) -> bool:
    """Whether requests decode on an instance whose role, or next role, excludes that."""
    load = instance.state.telemetry
    return not instance.does("decode") and load is not None and load.running + load.waiting > load.prefilling
