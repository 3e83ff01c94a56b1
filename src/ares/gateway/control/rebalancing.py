"""Moves of running requests: the loop that asks out-of-memory avoidance and the rebalance policy, and starts the moves.

Of several gateways in front of one pool, one at a time decides (gateway/control/lease.py). A fault in a decision costs
that decision and never the service (I7).
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from ares.config import GatewayConfig
from ares.gateway.control.decider import Decider
from ares.gateway.control.lease import Lease
from ares.gateway.control.snapshot import ClusterSnapshot, SnapshotBuilder
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import Pool
from ares.gateway.records.decision_log import DecisionLog
from ares.gateway.records.metrics import Metrics
from ares.gateway.session.session import Session
from ares.gateway.tuning import Tuning
from ares.policy import DecisionError, MigrationDecision, Preset, Rebalance, decide_moves, rebalancer
from ares.policy.oom_avoidance import NO_TARGET, OomAvoidanceSettings, avoid_oom, exclude_conflicts

logger = logging.getLogger(__name__)

Migrate = Callable[[Session, Instance, str, str], Coroutine[Any, Any, Any]]
Suspend = Callable[[Session, str], Coroutine[Any, Any, None]]


class Rebalancing:
    """Decides moves, under the preset in force.

    Parameters
    ----------
    config, pool, sessions, metrics, snapshots, lease, log, tuning
        The gateway's.
    migrate
        Migrates a session to an instance, for a reason and a trigger.
    suspend
        Suspends a session, for a reason.
    spawn
        Runs a coroutine in the background of the gateway.

    Attributes
    ----------
    decider
        Asks the rebalance policy, and counts its faults.
    """

    def __init__(
        self,
        config: GatewayConfig,
        pool: Pool,
        sessions: Mapping[str, Session],
        metrics: Metrics,
        snapshots: SnapshotBuilder,
        lease: Lease,
        log: DecisionLog,
        tuning: Tuning,
        migrate: Migrate,
        suspend: Suspend,
        spawn: Callable[[Coroutine[Any, Any, Any]], "asyncio.Task[Any]"],
    ) -> None:
        self._config, self._pool, self._sessions, self._metrics = config, pool, sessions, metrics
        self._snapshots, self._lease, self._log, self._tuning = snapshots, lease, log, tuning
        self._migrate, self._suspend, self._spawn = migrate, suspend, spawn
        # Tasks of the moves and suspensions that the newest decision has started.
        self._started: list[asyncio.Task[Any]] = []
        self.use("", Preset())  # nothing moves until a preset is in force

    def use(self, name: str, preset: Preset) -> None:
        """Decide by a preset from now on; what is being decided by another one is dropped."""
        self._name, self._preset = name, preset
        self.decider: Decider[Rebalance, list[MigrationDecision]] = Decider(
            rebalancer(preset.rebalance, preset.rebalance_settings), decide_moves
        )

    async def run(self) -> None:
        """Decide moves, period after period, until cancelled."""
        while True:
            await asyncio.sleep(self._config.period_s)
            if not self._preset.moves:
                continue
            try:
                result = await self._decide_moves_with_lease()
            except Exception:
                logger.exception("rebalancing failed; serving continues")
                self._metrics.faults.labels("rebalance").inc()
                result = "failed"
            self._metrics.decisions.labels(result).inc()

    async def _decide_moves_with_lease(self) -> str:
        """Decide moves if the lease is granted within a period.

        Returns
        -------
        The result as the metric counts it: `elsewhere` (another gateway has the lease), `moved` (moves or
        suspensions were started), `kept` (none was) or `failed`.
        """
        if not await self._lease.acquire(self._config.period_s):
            return "elsewhere"
        self._started = []
        try:
            return await self._decide_moves()
        finally:
            self._spawn(self._lease.release(self._started))

    async def _decide_moves(self) -> str:
        """Ask out-of-memory avoidance, then the rebalance policy, and start what they decide; return the result."""
        # Most instances exchange their requests; what differs from them neither gives nor takes any.
        snapshot = self._snapshots.build(self._sessions.values(), self._pool.differing().keys())
        avoids_oom = self._preset.avoids_oom
        if avoids_oom:
            # They resume on an instance that has room, not on the one that had none.
            for session in (s for s in snapshot.preempted if s.unmovable_now() is None):
                self._spawn(self._suspend(session, "preempted"))
        oom_avoidance = OomAvoidanceSettings(lookahead_s=2.0 * self._config.period_s + snapshot.cluster.stall_s)
        # Only where suspension is part of the preset: the presets for comparison must not get it as well.
        oom_actions = avoid_oom(snapshot.cluster, oom_avoidance, snapshot.running) if avoids_oom else []
        name, decider = self._name, self.decider
        decided, failed = await self._call_rebalancer(decider, snapshot)
        if decider is not self.decider:  # another preset was put in force meanwhile
            return "kept"
        moves = exclude_conflicts(decided, oom_actions)
        self._log.moves(
            name, snapshot, decider.policy, oom_avoidance if avoids_oom else None, oom_actions, moves, failed
        )
        for one in oom_actions:
            session = snapshot.sessions[one.request]
            self._metrics.oom_actions.labels("suspended" if one.target == NO_TARGET else "moved").inc()
            if one.target == NO_TARGET:
                self._started.append(self._spawn(self._suspend(session, f"out-of-memory avoidance: {one.reason}")))
            else:
                self._start_move(
                    session, snapshot.instances[one.target], f"out-of-memory avoidance: {one.reason}", "avoid_oom"
                )
        for move in moves:
            session, target = snapshot.sessions[move.request], snapshot.instances[move.target]
            self._start_move(session, target, f"{name}: {move.reason}", name)
        return "failed" if failed else "moved" if moves or oom_actions else "kept"

    async def _call_rebalancer(
        self, decider: Decider[Rebalance, list[MigrationDecision]], snapshot: ClusterSnapshot
    ) -> tuple[list[MigrationDecision], str | None]:
        """Return the moves of the policy, and how it failed, if it did: out-of-memory avoidance acts even then (I7)."""
        try:
            timeout_s = max(self._config.period_s, self._tuning.decision_s)
            return await decider.decide(snapshot.cluster, timeout_s=timeout_s), None
        except DecisionError as error:
            decider.record_fault(error)
            self._metrics.faults.labels("rebalance").inc()
            return [], error.kind

    def _start_move(self, session: Session, target: Instance, reason: str, trigger: str) -> None:
        logger.info("migrate %s to %s: %s", session.id, target.name, reason)
        session.span.event("migrate", {"ares.reason": reason, "ares.target": target.name})
        self._started.append(self._spawn(self._try_to_migrate(session, target, reason, trigger)))

    async def _try_to_migrate(self, session: Session, target: Instance, reason: str, trigger: str) -> None:
        try:
            await self._migrate(session, target, reason, trigger)
        except Exception as error:  # the policy saw an older state, or the migration failed: the request continues
            logger.info("did not migrate %s: %s", session.id, error)
            session.span.event("not migrated", {"ares.reason": str(error), "ares.target": target.name})
