"""Emptying instances that drain: what can move is moved, a few at a time; at the deadline the rest is broken off.

Each gateway sees to its own requests, whoever has ordered the drain: the instance tells all of them, deadline included.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, Protocol

from ares.gateway.control.controller import Controller
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import Pool
from ares.gateway.records.metrics import Metrics
from ares.gateway.session.handover import MigrationRecord, NotMovableError
from ares.gateway.session.precopy import WantedMode
from ares.gateway.session.session import Session
from ares.policy.transfer import PRE_COPY

logger = logging.getLogger(__name__)

DRAIN = "drain"
_PERIOD_S = 0.1
# Moves off one instance at a time: all at once would stall each other and flood the targets.
_AT_ONCE = 4
# A sequence that could not be moved is tried again after this long.
_RETRY_S = 1.0


class _Gateway(Protocol):
    """What emptying an instance needs of the gateway."""

    pool: Pool
    metrics: Metrics
    controller: Controller

    @property
    def sequences(self) -> Mapping[str, Session]: ...

    def takes(self, sequence: Session, target: Instance) -> bool: ...

    def migrate(
        self, sequence: Session, target: Instance, reason: str, trigger: str, mode: WantedMode
    ) -> Coroutine[Any, Any, MigrationRecord]: ...


class Drainer:
    """Looks after the instances that drain, whoever has ordered it.

    Parameters
    ----------
    gateway
        Knows the instances and the sequences, and moves them.
    spawn
        Runs a coroutine in the background of the gateway.
    """

    def __init__(self, gateway: _Gateway, spawn: Callable[[Coroutine[Any, Any, Any]], object]) -> None:
        self._gateway = gateway
        self._spawn = spawn
        # When requests were broken off last.
        self._broken_off: dict[Instance, float] = {}
        # By the sequence's id: where it is moved from, and when a move was tried last.
        self._moving: dict[str, Instance] = {}
        self._tried: dict[str, float] = {}

    async def drain(self, instance: Instance, deadline_s: float) -> None:
        """Close an instance, and begin to empty it."""
        logger.info("%s drains; deadline %g s", instance.name, deadline_s)
        await instance.drain(deadline_s)

    async def undrain(self, instance: Instance) -> None:
        """Let an instance take work again."""
        await instance.undrain()

    def left(self, instance: Instance) -> int:
        """Return how many requests are still there, those of other gateways and KV that waits to be pulled included."""
        ours = sum(1 for _ in self._on(instance))
        return max(ours, instance.state.telemetry.left if instance.state.telemetry is not None else 0)

    async def run(self) -> None:
        """Empty what drains, until cancelled."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            for instance in self._gateway.pool.instances:
                if instance.state.draining:
                    try:
                        self._empty(instance)
                    except Exception:  # costs this look, never the service (I7)
                        logger.exception("cannot empty %s", instance.name)
                        self._gateway.metrics.faults.labels(DRAIN).inc()
                else:
                    self._broken_off.pop(instance, None)

    def _on(self, instance: Instance) -> Iterator[Session]:
        return (s for s in self._gateway.sequences.values() if s.works_on(instance))

    def _empty(self, instance: Instance) -> None:
        now = time.monotonic()
        if instance.state.drain_deadline is not None and now > instance.state.drain_deadline:
            self._break_off(instance, now)
            return
        room = _AT_ONCE - sum(1 for source in self._moving.values() if source is instance)
        self._tried = {name: at for name, at in self._tried.items() if now - at < _RETRY_S}
        for sequence in self._on(instance):
            if room <= 0:
                return
            known = sequence.id in self._moving or sequence.id in self._tried
            if not known and sequence.not_movable() is None:
                room -= 1
                self._moving[sequence.id] = instance
                self._spawn(self._move(sequence, instance))

    def _break_off(self, instance: Instance, now: float) -> None:
        """Let our requests leave, and now and then who has come since."""
        if now - self._broken_off.get(instance, float("-inf")) < _RETRY_S:
            return
        self._broken_off[instance] = now
        for sequence in self._on(instance):
            logger.info("%s leaves %s at the deadline", sequence.id, instance.name)
            sequence.leave(instance)

    async def _move(self, sequence: Session, source: Instance) -> None:
        outcome = "no room elsewhere"
        try:
            if (target := await self._target(sequence)) is not None:
                record = await self._gateway.migrate(sequence, target, f"{source.name} drains", DRAIN, PRE_COPY)
                outcome = record.outcome
        except NotMovableError as refusal:  # it has ended, or is under way already
            outcome = refusal.reason
        finally:
            del self._moving[sequence.id]
            self._tried[sequence.id] = time.monotonic()
            logger.info("drain of %s: %s: %s", source.name, sequence.id, outcome)

    async def _target(self, sequence: Session) -> Instance | None:
        """Return where dispatch would put it, of the instances that have room for it."""
        refused: set[str] = set()
        while (target := await self._gateway.controller.elsewhere(sequence, refused)) is not None:
            if self._gateway.takes(sequence, target):
                return target
            if target.name in refused:
                return None
            refused.add(target.name)
        return None
