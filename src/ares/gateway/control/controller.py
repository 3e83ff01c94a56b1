"""The live controller: the policies in force, and which requests are admitted to decode and where.

It decides; the sessions carry its decisions out. Of several gateways in front of one pool, each admits its own
sessions. Where prompts are computed, which requests move and which get warm copies is decided in prefill_candidates.py,
rebalancing.py and warm_copies.py.

A fault in a decision costs that decision and never the service (I7): waiting requests are then admitted by dispatch.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ares.config import GatewayConfig, live_preset
from ares.gateway.control import lengths
from ares.gateway.control.cached_candidates import CachedCandidates
from ares.gateway.control.compile_ahead import compile_ahead
from ares.gateway.control.decider import Decider
from ares.gateway.control.lease import Lease
from ares.gateway.control.prefill_candidates import PrefillCandidates
from ares.gateway.control.prefill_choice import PrefillChoice, Queues, cached_tokens
from ares.gateway.control.rebalancing import Migrate, Rebalancing
from ares.gateway.control.snapshot import ClusterSnapshot, SnapshotBuilder, accepting
from ares.gateway.control.warm_copies import WarmCopies
from ares.gateway.openai.sampling import LARGEST_PRIORITY
from ares.gateway.pool.instance import Instance, NoInstanceError
from ares.gateway.pool.pool import Pool
from ares.gateway.processes.shared_counts import SharedCounts
from ares.gateway.records.decision_log import DecisionLog
from ares.gateway.records.metrics import Metrics
from ares.gateway.session.eligibility import why_ineligible
from ares.gateway.session.handover import NotMovableError
from ares.gateway.session.phase import Phase
from ares.gateway.session.placement import Placement
from ares.gateway.session.session import Session
from ares.gateway.tuning import DEFAULT, Tuning
from ares.policy import (
    PRESETS,
    DecisionError,
    Preset,
    admission_policy,
    choose_instance,
    copier,
    decide_admissions,
    dispatcher,
    prefill_policy,
)
from ares.policy.admission import AdmissionDecision, memory_time
from ares.policy.oom_avoidance import prepare as prepare_oom_avoidance

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A session that waits for admission, to any instance but those in `exclude`."""

    session: Session
    admitted: asyncio.Future[Instance]
    exclude: set[str]


class NoRoomError(NoInstanceError):
    """The instances had no room for too long."""

    code = "waited_too_long"


def prepare(chosen: Preset) -> None:
    """Compile the policies of a preset.

    Without a cache of compiled code that takes about ten seconds: call it in a thread while streams run.
    """
    if _needs_remaining_tokens(chosen):
        compile_ahead()
        lengths.prepare()
    chosen.make()
    if chosen.avoids_oom:
        prepare_oom_avoidance()


def _needs_remaining_tokens(chosen: Preset) -> bool:
    """Whether the remaining tokens of every running request are needed all the time."""
    return chosen.moves or chosen.sees_requests or chosen.copies_requests


class Controller:
    """Chooses instances for sessions: for prefill, for admission to decode, and for migrations.

    Parameters
    ----------
    config
        The gateway's.
    pool, sessions, metrics
        The gateway's, shared.
    migrate
        Migrates a session to an instance, for a reason and a trigger.
    spawn
        Runs a coroutine in the background of the gateway.
    name, tuning
        The gateway's.
    counts
        Those that the processes of the gateway share.
    """

    def __init__(
        self,
        config: GatewayConfig,
        pool: Pool,
        sessions: Mapping[str, Session],
        metrics: Metrics,
        migrate: Migrate,
        spawn: Callable[[Coroutine[Any, Any, Any]], "asyncio.Task[Any]"],
        name: str,
        tuning: Tuning = DEFAULT,
        counts: SharedCounts | None = None,
    ) -> None:
        self._counts = counts or SharedCounts()
        self.snapshots = SnapshotBuilder(pool, metrics, name, self._counts)
        self.lease = Lease(pool, name, tuning)
        self.log = DecisionLog(config.decision_log)
        self._tuning = tuning
        self._config, self._pool, self._sessions, self._metrics = config, pool, sessions, metrics
        self._spawn = spawn
        self._waiting: dict[str, _Waiting] = {}
        self._changed = asyncio.Event()
        self._prefill_queues: Queues = WeakKeyDictionary()
        self._dispatching = asyncio.Lock()
        self._cached_candidates = CachedCandidates()
        # Lengths of the outputs that have ended since the last decision of admission.
        self._ended: deque[int] = deque(maxlen=tuning.kept_lengths)
        self.suspensions = 0
        self.rebalancing = Rebalancing(
            config, pool, sessions, metrics, self.snapshots, self.lease, self.log, tuning, migrate, self._suspend, spawn
        )
        self.use_preset(config.preset)

    # --- the policy in force ---

    def find_preset(self, name: str) -> Preset:
        """Return the preset that the gateway was started with, or another by its name; ValueError where there is none.

        Files can be given at the start of a gateway, and not by a command.
        """
        if name == self._config.preset:
            return live_preset(name, self._config.settings)
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return live_preset(name)

    def use_preset(self, name: str) -> None:
        """Switch the policies, also for sessions that wait already; ValueError where there is no such preset."""
        self._policy: Preset = self.find_preset(name)
        self.preset = name
        chosen = self._policy.for_objectives(self._config.slo_ttft_s)
        if _needs_remaining_tokens(chosen) or self._config.role_planner != "off":
            compile_ahead()
            lengths.prepare()
            self.snapshots.lengths.compile()
        self.dispatch_decider = Decider(dispatcher(chosen.dispatch, chosen.dispatch_settings), choose_instance)
        prefill = prefill_policy(chosen.prefill, chosen.prefill_settings)
        knows_cached = chosen.sees_prefixes or chosen.copies_requests
        self.prefills = PrefillChoice(
            prefill,
            self._config.slo_tpot_s,
            self._prefill_queues,
            sees_prefixes=knows_cached,
            log=partial(self.log.prefill, name),
        )
        self._prefill_candidates = PrefillCandidates(
            self._pool,
            self._metrics,
            self.prefills,
            self._record_fault,
            sees_prefixes=chosen.sees_prefixes,
            knows_cached=knows_cached,
        )
        if knows_cached:
            self._pool.follow_kv_events()
        self.warm_copies = WarmCopies(
            copier(chosen.copies, chosen.copies_settings),
            self._pool,
            self._sessions,
            self._metrics,
            self.snapshots,
            self._tuning,
            self._spawn,
            self._counts.processes,
            partial(self.log.copies, name),
        )
        self.admission_decider = Decider(
            admission_policy(chosen.admission, chosen.admission_settings), decide_admissions
        )
        self.rebalancing.use(name, chosen)
        self.snapshots.cooldown_s = self._config.cooldown(chosen)
        self._changed.set()

    @property
    def in_force(self) -> dict[str, Any]:
        """The preset with all its settings, and the gateway's settings that matter for decisions; None for no bound.

        `lengths`: how remaining lengths are estimated without a predictor, by the simulator's name for it.
        """
        config = self._config
        return {
            "preset": asdict(self._policy),
            "period_s": config.period_s,
            "cooldown_s": self.snapshots.cooldown_s,
            "slo_ttft_s": config.slo_ttft_s,
            "slo_tpot_s": config.slo_tpot_s,
            "slo_gap_s": config.slo_gap_s,
            "lengths": "length-curves" if self._tuning.length_curves else "residual-life",
        }

    @property
    def waiting(self) -> int:
        """How many prefilled sessions wait for admission."""
        return sum(1 for one in self._waiting.values() if one.session.phase is Phase.WAITING)

    @property
    def waiting_tokens(self) -> int:
        """How many tokens the sessions that wait for admission have."""
        return sum(one.session.tokens for one in self._waiting.values())

    @property
    def suspended(self) -> int:
        """How many suspended sessions wait to be resumed."""
        return len(self._waiting) - self.waiting

    @property
    def lease_status(self) -> dict[str, Any]:
        """Where moves are decided: `here` (in turns, if there are other gateways), `elsewhere` or `nowhere`."""
        lease = self.lease
        where = "nowhere" if not self._policy.moves else "elsewhere" if lease.missed else "here"
        return {"where": where, "holder": lease.holder or None, "missed_periods": lease.missed}

    # --- choice of instances (the protocol that a session uses) ---

    def choose_prefill(self, placement: Placement, destination: Instance | None) -> Instance | None:
        """Return the prefill instance that is to compute a prompt; None where a decode instance is to."""
        # Requests that wait for memory come before this one.
        return self._prefill_candidates.choose(placement, destination, to_decode=not self._waiting)

    def prefill_ended(self, placement: Placement, instance: Instance, cached_tokens: int | None) -> None:
        """Note that a chosen instance has answered, and how much of the prompt it had cached; None: it failed."""
        self._prefill_candidates.prefill_ended(placement, instance, cached_tokens)

    def decode_began(self, placement: Placement, instance: Instance) -> None:
        """Note that the first tokens of a request have come from where it decodes."""
        self._prefill_candidates.decode_began(placement, instance)

    async def admit(self, session: Session, exclude: set[str]) -> Instance:
        """Wait until the session is admitted to decode, and return the instance.

        Raises
        ------
        NoInstanceError
            No instance is open, or there was no room for too long.
        """
        unable = self._unable(session)
        # Where no instance may become ready by itself, or others have just failed it, an early error is better.
        recovers = not exclude and self._pool.may_become_ready(unable)
        timeout_s = self._config.maximum_wait_s if recovers else self._tuning.recovery_s
        exclude = exclude | unable
        # For this admission: another prompt, after a loss or a suspension, may be computed elsewhere.
        wanted, session.placement.computes_on = session.placement.computes_on, None
        wanted = wanted or self._prefill_candidates.resumes_on(session, exclude)
        if wanted is not None and wanted.takes("decode") and wanted.name not in exclude:
            instance = await self._admit_to(session, wanted, exclude)
        elif not self._policy.queues_requests:
            instance = await self._retry(lambda: self._dispatch(session, exclude | self._unable(session)), timeout_s)
            self.snapshots.publish_placed(session, instance)
        else:
            if exclude:
                await self._retry(lambda: self._any_accepting(exclude), timeout_s)
            instance = await self._wait_for_admission(session, exclude)
        self._prefill_candidates.admitted(session.placement, instance)
        if self._policy.preempts_largest:
            median = self.snapshots.median_remaining(session)
            session.placement.priority = min(int(memory_time(float(session.tokens), median)), LARGEST_PRIORITY)
        else:
            session.placement.priority = 0
        return instance

    async def _admit_to(self, session: Session, wanted: Instance, exclude: set[str]) -> Instance:
        """Admit a session to the instance that is to compute its prompt, or elsewhere if that has no room soon."""
        if not self._policy.queues_requests:
            self.snapshots.instance_loads.add(wanted, session.tokens)
            self.snapshots.publish_placed(session, wanted)
            return wanted
        others = {i.name for i in self._pool.decode_instances if i is not wanted}
        try:
            async with asyncio.timeout(self._tuning.prefix_wait_s):
                return await self._wait_for_admission(session, exclude | others)
        except TimeoutError:
            return await self._wait_for_admission(session, exclude)

    async def _any_accepting(self, exclude: set[str]) -> Instance | None:
        """Return some instance that takes work, if there is one."""
        return next(iter(accepting(self._pool.decode_instances, exclude)), None)

    async def _retry(self, find: Callable[[], Awaitable[Instance | None]], timeout_s: float) -> Instance:
        """Call `find` until it returns an instance; NoInstanceError where it has not after so many seconds."""
        until = time.monotonic() + timeout_s
        while (instance := await find()) is None:
            if time.monotonic() > until:
                raise NoInstanceError("no decode instance is ready")
            await self._pool.wait_for_change(self._tuning.dispatch_retry_s)
        return instance

    async def choose_decode(self, session: Session, exclude: set[str]) -> Instance | None:
        """Return the instance that dispatch would choose for a running session now, none of the names in `exclude`."""
        return await self._dispatch(session, exclude | self._unable(session))

    def _unable(self, session: Session) -> set[str]:
        """Return the names of the instances that cannot continue this session, with its KV where that is kept."""
        kept_by = session.instance
        kv = kept_by.state.settings if kept_by is not None else session.placement.pinned_kv.settings
        return {
            i.name for i in self._pool.decode_instances if why_ineligible(session.placement, i.state, kv) is not None
        }

    async def _dispatch(self, session: Session, exclude: set[str]) -> Instance | None:
        """Return the instance that dispatch chooses; where dispatch fails, the one with the fewest sessions (I7)."""
        decider, policy = self.dispatch_decider, self.dispatch_decider.policy
        # One after the other: each decision needs the one before it.
        async with self._dispatching:
            others = (s for s in self._sessions.values() if s is not session)
            try:
                snapshot = (
                    self.snapshots.build(others, exclude)
                    if policy.sees_requests
                    else self.snapshots.build_loads(others, exclude)
                )
                if policy.sees_prefixes(policy.settings):
                    cached = cached_tokens(session.placement, snapshot.instances)
                    snapshot = replace(snapshot, cluster=replace(snapshot.cluster, cached_tokens=cached))
                remaining = np.array(self.snapshots.remaining(session, None)) if policy.predicts else None
                memory = policy.memory()
                index = await decider.decide(
                    snapshot.cluster, session.tokens, remaining, timeout_s=self._tuning.decision_s
                )
            except Exception as error:
                self._record_fault(decider, error)
                return self._choose_fewest_sessions(exclude)
        self.log.dispatch(self.preset, policy, memory, snapshot, session.tokens, remaining, index)
        if index is None:
            return None
        chosen = snapshot.instances[index]
        session.span.event("dispatch", {"ares.policy": policy.name, "ares.instance": chosen.name})
        self.snapshots.instance_loads.add(chosen, session.tokens)
        return chosen

    def _record_fault(self, decider: Decider[Any, Any], error: Exception) -> None:
        """Count a fault of prefill, dispatch or admission: of the policy, or in making its arguments."""
        if isinstance(error, DecisionError):
            decider.record_fault(error)
        else:
            logger.error("%s failed", decider.policy.part, exc_info=error)
        self._metrics.faults.labels(decider.policy.part).inc()

    def _choose_fewest_sessions(self, exclude: set[str]) -> Instance | None:
        """Return the instance with the fewest of our sessions: a choice that needs neither policy nor telemetry."""
        used = Counter(id(s.instance or s.destination) for s in self._sessions.values())
        return min(accepting(self._pool.decode_instances, exclude), key=lambda i: used[id(i)], default=None)

    async def _wait_for_admission(self, session: Session, exclude: set[str]) -> Instance:
        """Wait until the admission policy admits the session."""
        future: asyncio.Future[Instance] = asyncio.get_running_loop().create_future()
        self._waiting[session.id] = _Waiting(session, future, exclude)
        self._counts.set_waiting(len(self._waiting))
        self._changed.set()
        try:
            async with asyncio.timeout(self._config.maximum_wait_s):
                return await future
        except TimeoutError:
            raise NoRoomError(f"no room for {self._config.maximum_wait_s:g} s") from None
        finally:
            self._waiting.pop(session.id, None)
            self._counts.set_waiting(len(self._waiting))

    def wake_admission(self) -> None:
        """Let admission decide again: a session has ended or left an instance, so there may be room."""
        self._changed.set()

    def record_output(self, session: Session) -> None:
        """Record the length of an output that has ended or was given up, for what learns from it."""
        tokens, complete = len(session.emitted), session.output.finished
        if session.instance is not None:
            self.prefills.note_sent(session.placement, session.instance)
        self.snapshots.lengths.running = len(self._sessions)
        if tokens:
            self.snapshots.lengths.add(tokens, session.length_features, was_cut=session.output.at_limit or not complete)
        if complete:
            self._ended.append(tokens)

    # --- admission ---

    async def admit_waiting(self) -> None:
        """Admit waiting sessions to decode, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._tuning.admission_longest_s if self._decision_due else None):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            pause = 0.0
            if self._decision_due:  # otherwise the next arrival need not wait for the pause after a decision
                begun = time.perf_counter()
                try:
                    await self._decide_admissions()
                except Exception as error:
                    self._record_fault(self.admission_decider, error)
                    await self._admit_by_dispatch()
                    pause = self._tuning.admission_shortest_s
                else:
                    took = time.perf_counter() - begun
                    pause = max(self._tuning.admission_shortest_s, took / self._tuning.admission_share - took)
            self._metrics.waiting.set(self.waiting)
            self._metrics.suspended.set(self.suspended)
            await asyncio.sleep(pause)

    @property
    def _decision_due(self) -> bool:
        """Whether admission has anything to decide."""
        return bool(self._waiting) or (self.admission_decider.policy.watches and bool(self._sessions))

    async def _decide_admissions(self) -> None:
        if not self.admission_decider.policy.queues_requests:
            await self._admit_by_dispatch()
            return
        async with self._counts.turn(self._tuning.decision_s):
            await self._decide_admissions_in_turn()

    async def _decide_admissions_in_turn(self) -> None:
        decider, policy = self.admission_decider, self.admission_decider.policy
        waiting = [one for one in self._waiting.values() if not one.admitted.done()]
        excludes = [one.exclude | self._unable(one.session) for one in waiting]
        snapshot = self.snapshots.build(s for s in self._sessions.values() if s.id not in self._waiting)
        candidates = self.snapshots.candidates([one.session for one in waiting], snapshot.cluster, excludes)
        sees = policy.sees_prefixes(policy.settings)
        if sees or self._policy.copies_requests:
            # Without the former, what is cached counts for suspended requests alone, which have warm copies.
            rows = [n for n, one in enumerate(waiting) if sees or candidates.suspended[n]]
            cached = np.zeros((len(waiting), len(snapshot.instances)), np.int64)
            cached[rows] = self._cached_candidates.of([waiting[n].session for n in rows], snapshot.instances)
            candidates = replace(candidates, cached_tokens=cached)
        memory, ended = policy.memory(), list(self._ended)
        decisions = await decider.decide(
            snapshot.cluster, candidates, snapshot.running, ended, timeout_s=self._tuning.decision_s
        )
        for _ in ended:
            self._ended.popleft()
        self.log.admissions(self.preset, policy, memory, ended, snapshot, candidates, decisions)
        if decider is not self.admission_decider:  # the preset was switched meanwhile
            return
        for decision in decisions:
            self._metrics.admissions.labels(decision.kind).inc()
            self._carry_out(decision, snapshot, waiting)

    def _carry_out(self, decision: AdmissionDecision, snapshot: ClusterSnapshot, waiting: list[_Waiting]) -> None:
        """Carry out one decision of admission; its indices are those of `snapshot` and `waiting`."""
        instance = snapshot.instances[decision.instance]
        if decision.kind == "suspend":
            self._spawn(self._suspend(snapshot.sessions[decision.index], decision.reason))
            return
        one = waiting[decision.index]
        about = {"ares.policy": self.admission_decider.policy.name, "ares.reason": decision.reason}
        one.session.span.event(decision.kind, {**about, "ares.instance": instance.name})
        if decision.kind == "resume":
            logger.info("%s %s on %s: %s", decision.kind, one.session.id, instance.name, decision.reason)
        self._admit(one, instance)

    def _admit(self, one: _Waiting, instance: Instance) -> None:
        if self._waiting.get(one.session.id) is not one:  # it has ended while the policy decided
            return
        del self._waiting[one.session.id]
        self._counts.set_waiting(len(self._waiting))
        one.session.destination = instance
        self.snapshots.publish_placed(one.session, instance)
        if not one.admitted.done():
            one.admitted.set_result(instance)

    async def _admit_by_dispatch(self) -> None:
        """Admit every waiting session where dispatch sends it; without an open instance it keeps waiting."""
        for one in list(self._waiting.values()):
            instance = await self._dispatch(one.session, one.exclude | self._unable(one.session))
            if instance is not None:
                self._admit(one, instance)

    async def _suspend(self, session: Session, reason: str) -> None:
        try:
            outcome = await session.suspend()
        except NotMovableError as refusal:  # the policy saw an older state
            outcome = refusal.reason
        session.span.event("suspend", {"ares.reason": reason, "ares.outcome": outcome})
        self.suspensions += outcome in ("suspended", "withdrawn")
        logger.info("suspend %s (%s): %s", session.id, outcome, reason)
        self._changed.set()

    async def publish_placed(self) -> None:
        """Tell the other processes of the gateway what this one has on each instance, again and again."""
        while True:
            await asyncio.sleep(self._config.telemetry_interval_s)
            try:
                self.snapshots.publish(self._sessions.values())
            except Exception:  # only this time, not the service (I7)
                logger.exception("cannot tell the other processes what is placed")
                self._metrics.faults.labels("placed").inc()

    # --- warm copies ---

    async def copy_running(self) -> None:
        """Bring warm copies of running requests to other instances, period after period, until cancelled."""
        looked_up_s = 0.0
        while True:
            await asyncio.sleep(max(self._config.period_s, looked_up_s / self._tuning.admission_share))
            looked_up_s = 0.0
            if not self._policy.copies_requests:
                continue
            try:
                await self.warm_copies.decide(self.prefills.token_s)
                looked_up_s = self.warm_copies.looked_up_s
            except Exception:
                logger.exception("warm copies failed; serving continues")
                self._metrics.faults.labels("copies").inc()
