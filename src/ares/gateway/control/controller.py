"""The live controller: who enters decode and where, who moves, who gives way. It decides; sequences carry it out.

Of several gateways before one pool each lets its own sequences in; they decide moves in turns
(gateway/control/lease.py).

A fault in a decision costs that decision and never the service (I7): whoever waits is then let in by plain dispatch.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ares.config import GatewayConfig, live_preset
from ares.gateway.control import lengths
from ares.gateway.control.compile_ahead import compile_ahead
from ares.gateway.control.decider import Decider
from ares.gateway.control.lease import Lease
from ares.gateway.control.snapshot import ClusterSnapshot, SnapshotBuilder, taking
from ares.gateway.pool.instance import Instance, NoInstanceError
from ares.gateway.pool.pool import Pool
from ares.gateway.records.decision_log import DecisionLog
from ares.gateway.records.metrics import Metrics
from ares.gateway.session.handover import NotMovableError
from ares.gateway.session.placement import Entering
from ares.gateway.session.session import Session
from ares.policy import (
    PRESETS,
    DecisionError,
    MigrationDecision,
    Preset,
    Rebalance,
    admission_policy,
    choose_instance,
    decide_admissions,
    decide_moves,
    dispatcher,
    rebalancer,
)
from ares.policy.admission import AdmissionDecision, memory_time
from ares.policy.oom_avoidance import NO_TARGET, OomAvoidanceSettings, avoid_oom, exclude_conflicts
from ares.policy.oom_avoidance import prepare as prepare_rescue

logger = logging.getLogger(__name__)

# One that was blamed for a broken stream is heard again within so long, if it is alive.
_BLAMED_S = 3.0
_LOOK_S = 0.2
# Admission is decided when something has changed, but not all the time, and now and then in any case.
_SHORTEST_S, _LONGEST_S = 0.002, 0.25
# A policy may take a period to decide its moves, and in any case so long: the processor may be busy with others. For
# dispatch and admission, requests wait.
_LEAST_TO_DECIDE_S = 0.5
# Outputs that have ended, of which an admission policy that has not been asked for long is told.
_ENDED = 2000
# And it takes at most this share of a core.
_SHARE = 0.1
# vLLM's priority is a signed 64-bit number in a JSON body; far below what a double holds exactly.
_LARGEST_PRIORITY = 1 << 40


@dataclass(frozen=True, slots=True)
class _Held:
    """One that waits for admission; instances in `exclude` it does not enter."""

    sequence: Session
    admitted: asyncio.Future[Instance]
    exclude: set[str]


class NoRoomError(NoInstanceError):
    """The instances are there, and there was no room on them for too long."""

    code = "waited_too_long"


MoveOrder = Callable[[Session, Instance, str, str], Coroutine[Any, Any, Any]]


def prepare(chosen: Preset) -> None:
    """Compile what a preset decides with.

    It takes some ten seconds where nothing is in the cache of compiled code: call it in a thread while streams run.
    """
    if _looks_ahead(chosen):
        compile_ahead()
        lengths.prepare()
    chosen.make()
    if chosen.rescues:
        prepare_rescue()


def _looks_ahead(chosen: Preset) -> bool:
    """Whether what is left of every running request is asked for all the time."""
    return chosen.moves or chosen.looks_ahead


class Controller:
    """Chooses instances for sequences, now and later.

    Parameters
    ----------
    config
        The gateway's.
    pool, sequences, metrics
        The gateway's, shared.
    move
        Carries out a move of a sequence to an instance, for a reason and a trigger; runs by itself.
    spawn
        Runs a coroutine in the background of the gateway.
    name
        The gateway's.
    """

    def __init__(
        self,
        config: GatewayConfig,
        pool: Pool,
        sequences: Mapping[str, Session],
        metrics: Metrics,
        move: MoveOrder,
        spawn: Callable[[Coroutine[Any, Any, Any]], "asyncio.Task[Any]"],
        name: str,
    ) -> None:
        self.snapshots = SnapshotBuilder(pool, metrics, name)
        self.lease = Lease(pool, name)
        self.log = DecisionLog(config.decision_log)
        self._config, self._pool, self._sequences, self._metrics = config, pool, sequences, metrics
        self._move, self._spawn = move, spawn
        self._held: dict[str, _Held] = {}
        self._changed = asyncio.Event()
        self._prefills: dict[str, int] = {}
        # What the newest decision has set going.
        self._ordered: list[asyncio.Task[Any]] = []
        self._placing = asyncio.Lock()
        # Lengths of the outputs that have ended since admission was asked last.
        self._ended: deque[int] = deque(maxlen=_ENDED)
        self.suspensions = 0
        self.use_preset(config.preset)

    # --- the policy in force ---

    def find(self, name: str) -> Preset:
        """Return the preset that the gateway was started with, or another by its name; ValueError where there is none.

        Files are for those who start a gateway, not for those who command it.
        """
        if name == self._config.preset:
            return live_preset(name, self._config.settings)
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return live_preset(name)

    def use_preset(self, name: str) -> None:
        """Switch the policy, for those who wait too; ValueError where there is no such preset."""
        self._policy: Preset = self.find(name)
        self.preset = name
        chosen = self._policy.for_objectives(self._config.slo_ttft_s)
        if _looks_ahead(chosen):
            compile_ahead()
            lengths.prepare()
            self.snapshots.lengths.compile()
        self.dispatch = Decider(dispatcher(chosen.dispatch, chosen.dispatch_settings), choose_instance)
        self.admission = Decider(admission_policy(chosen.admission, chosen.admission_settings), decide_admissions)
        self.decider = Decider(rebalancer(chosen.rebalance, chosen.rebalance_settings), decide_moves)
        self.snapshots.cooldown_s = self._config.cooldown(chosen)
        self._changed.set()

    @property
    def in_force(self) -> dict[str, Any]:
        """The preset with all its settings, and the gateway's own that decide with it; seconds, None for no bound."""
        config = self._config
        return {
            "preset": asdict(self._policy),
            "period_s": config.period_s,
            "cooldown_s": self.snapshots.cooldown_s,
            "slo_ttft_s": config.slo_ttft_s,
            "slo_tpot_s": config.slo_tpot_s,
            "slo_gap_s": config.slo_gap_s,
        }

    @property
    def held(self) -> int:
        """How many prefilled sequences wait for admission."""
        return sum(1 for held in self._held.values() if held.sequence.phase == "held")

    @property
    def suspended(self) -> int:
        """How many sequences have given their room up and wait for it again."""
        return len(self._held) - self.held

    @property
    def turns(self) -> dict[str, Any]:
        """Tell where moves are decided: `here` (in turns, where there are other gateways), `elsewhere` or `nowhere`."""
        lease = self.lease
        where = "nowhere" if not self._policy.moves else "elsewhere" if lease.missed else "here"
        return {"where": where, "holder": lease.holder or None, "missed_periods": lease.missed}

    # --- placement (the protocol that a sequence uses) ---

    def prefill(self) -> Instance | None:
        """Return the open prefill instance with the least work; None where the decode instance shall prefill."""
        candidates = [i for i in self._pool.prefill() if i.open]
        # In a pool without separate prefill instances, moving the KV of every prompt would gain nothing.
        if not candidates or all(i.role == "both" for i in self._pool.instances):
            return None
        order = self._prefills
        chosen = min(candidates, key=lambda i: (_queue(i), order.get(i.name, 0)))
        # Of equally busy ones, the one that was chosen longest ago.
        order[chosen.name] = max(order.values(), default=0) + 1
        return chosen

    async def admit(self, sequence: Entering, exclude: set[str]) -> Instance:
        """Wait until the sequence may decode, and return where.

        Raises
        ------
        NoInstanceError
            No instance is open, or there was no room for too long.
        """
        assert isinstance(sequence, Session)  # noqa: S101 - for the type checker: there are no others
        unfit = self._unfit(sequence)
        # Where others have just failed it, it is better told soon than late.
        most_s = _BLAMED_S if exclude or not self._pool.expected(unfit) else self._config.maximum_wait_s
        exclude = exclude | unfit
        if not self._policy.holds:
            instance = await self._soon(lambda: self._place(sequence, exclude), most_s)
        else:
            if exclude:
                await self._soon(lambda: self._any(exclude), most_s)
            instance = await self._admitted(sequence, exclude)
        if self._policy.preempts_largest:
            middle = self.snapshots.remaining(sequence, None)[1]
            sequence.priority = min(int(memory_time(float(sequence.tokens), middle)), _LARGEST_PRIORITY)
        else:
            sequence.priority = 0
        return instance

    async def _any(self, exclude: set[str]) -> Instance | None:
        """Return some instance that takes work, if there is one."""
        return next(iter(taking(list(self._pool.decode()), exclude)), None)

    async def _soon(self, find: Callable[[], Awaitable[Instance | None]], most_s: float) -> Instance:
        """Find an instance, within so many seconds."""
        until = time.monotonic() + most_s
        while (instance := await find()) is None:
            if time.monotonic() > until:
                raise NoInstanceError("no decode instance is ready")
            await self._pool.change(_LOOK_S)
        return instance

    async def elsewhere(self, sequence: Session, exclude: set[str]) -> Instance | None:
        """Return where dispatch would put a running sequence now, but for the instances named."""
        return await self._place(sequence, exclude)

    def _unfit(self, sequence: Session) -> set[str]:
        """Return the names of instances that would not restore a sequence's state: they joined after it had begun."""
        return {i.name for i in self._pool.decode() if i.state.lacks(sequence.sampling.needs)}

    async def _place(self, sequence: Session, exclude: set[str]) -> Instance | None:
        """Ask dispatch; where it fails, the instance with the fewest requests takes the sequence (I7)."""
        decider, policy = self.dispatch, self.dispatch.policy
        # One after the other: each is to see where the one before it goes.
        async with self._placing:
            others = (s for s in self._sequences.values() if s is not sequence)
            try:
                view = (
                    self.snapshots.view(others, exclude)
                    if policy.sees_requests
                    else self.snapshots.loads(others, exclude)
                )
                remaining = np.array(self.snapshots.remaining(sequence, None)) if policy.predicts else None
                memory = policy.memory()
                index = await decider.decide(view.cluster, sequence.tokens, remaining, most_s=_LEAST_TO_DECIDE_S)
            except Exception as error:
                self._failed(decider, error)
                return self._fewest(exclude)
        self.log.placement(self.preset, policy, memory, view, sequence.tokens, remaining, index)
        return view.instances[index] if index is not None else None

    def _failed(self, decider: Decider[Any, Any], error: Exception) -> None:
        """Count a fault of dispatch or admission: of the policy, or of what was made for it."""
        if isinstance(error, DecisionError):
            decider.note(error)
        else:
            logger.error("%s failed", decider.policy.part, exc_info=error)
        self._metrics.faults.labels(decider.policy.part).inc()

    def _fewest(self, exclude: set[str]) -> Instance | None:
        """Return the instance with the fewest of our sequences: a choice that needs neither policy nor telemetry."""
        used = Counter(id(s.instance or s.destination) for s in self._sequences.values())
        return min(taking(list(self._pool.decode()), exclude), key=lambda i: used[id(i)], default=None)

    async def _admitted(self, sequence: Session, exclude: set[str]) -> Instance:
        """Wait for admission to let the sequence in."""
        future: asyncio.Future[Instance] = asyncio.get_running_loop().create_future()
        self._held[sequence.id] = _Held(sequence, future, exclude)
        self._changed.set()
        try:
            async with asyncio.timeout(self._config.maximum_wait_s):
                return await future
        except TimeoutError:
            raise NoRoomError(f"no room for {self._config.maximum_wait_s:g} s") from None
        finally:
            self._held.pop(sequence.id, None)

    def changed(self) -> None:
        """Say that a sequence has ended or left: there may be room."""
        self._changed.set()

    def ended(self, output_tokens: int) -> None:
        """Note the length of an output that has come to its end, for the policies that learn from it."""
        self.snapshots.lengths.add(output_tokens)
        self._ended.append(output_tokens)

    # --- admission ---

    async def let_in(self) -> None:
        """Let sequences into decode, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(_LONGEST_S if self._to_decide else None):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            pause = 0.0
            if self._to_decide:  # whoever comes next does not wait for a decision about nobody
                begun = time.perf_counter()
                try:
                    await self._decide_entries()
                except Exception as error:
                    self._failed(self.admission, error)
                    await self._open_the_doors()
                    pause = _SHORTEST_S
                else:
                    took = time.perf_counter() - begun
                    pause = max(_SHORTEST_S, took / _SHARE - took)
            self._metrics.held.set(self.held)
            self._metrics.suspended.set(self.suspended)
            await asyncio.sleep(pause)

    @property
    def _to_decide(self) -> bool:
        """Whether admission has anything to decide."""
        return bool(self._held) or (self.admission.policy.watches and bool(self._sequences))

    async def _decide_entries(self) -> None:
        decider, policy = self.admission, self.admission.policy
        if not policy.holds:
            await self._open_the_doors()
            return
        held = [one for one in self._held.values() if not one.admitted.done()]
        excludes = [one.exclude | self._unfit(one.sequence) for one in held]
        view = self.snapshots.view(s for s in self._sequences.values() if s.id not in self._held)
        candidates = self.snapshots.candidates([one.sequence for one in held], view.cluster, excludes)
        memory, ended = policy.memory(), list(self._ended)
        entries = await decider.decide(view.cluster, candidates, view.running, ended, most_s=_LEAST_TO_DECIDE_S)
        for _ in ended:
            self._ended.popleft()
        self.log.entries(self.preset, policy, memory, ended, view, candidates, entries)
        if decider is not self.admission:  # another preset was put in force meanwhile
            return
        for entry in entries:
            self._metrics.entries.labels(entry.kind).inc()
            self._carry_out(entry, view, held)

    def _carry_out(self, entry: AdmissionDecision, view: ClusterSnapshot, held: list[_Held]) -> None:
        instance = view.instances[entry.instance]
        if entry.kind == "suspend":
            self._spawn(self._suspend(view.sequences[entry.index], entry.reason))
            return
        one = held[entry.index]
        if entry.kind == "resume":
            logger.info("%s %s on %s: %s", entry.kind, one.sequence.id, instance.name, entry.reason)
        self._let(one, instance)

    def _let(self, held: _Held, instance: Instance) -> None:
        if self._held.get(held.sequence.id) is not held:  # it has left while the policy was asked
            return
        del self._held[held.sequence.id]
        held.sequence.destination = instance
        if not held.admitted.done():
            held.admitted.set_result(instance)

    async def _open_the_doors(self) -> None:
        """Let in everybody who waits, by plain dispatch; whoever finds no open instance goes on waiting."""
        for held in list(self._held.values()):
            instance = await self._place(held.sequence, held.exclude | self._unfit(held.sequence))
            if instance is not None:
                self._let(held, instance)

    async def _suspend(self, sequence: Session, reason: str) -> None:
        try:
            outcome = await sequence.suspend()
        except NotMovableError as refusal:  # the policy saw an older state
            outcome = refusal.reason
        self.suspensions += outcome in ("suspended", "withdrawn")
        logger.info("suspend %s (%s): %s", sequence.id, outcome, reason)
        self._changed.set()

    # --- moves ---

    async def rebalance(self) -> None:
        """Decide moves, period after period, until cancelled."""
        while True:
            await asyncio.sleep(self._config.period_s)
            if not self._policy.moves:
                continue
            try:
                result = await self._take_turn()
            except Exception:
                logger.exception("rebalancing failed; serving goes on")
                self._metrics.faults.labels("rebalance").inc()
                result = "failed"
            self._metrics.decisions.labels(result).inc()

    async def _take_turn(self) -> str:
        """Decide once it is this gateway's turn, and return what came of it."""
        if not await self.lease.take(self._config.period_s):
            return "elsewhere"
        self._ordered = []
        try:
            return await self._decide_moves()
        finally:
            self._spawn(self.lease.give_back(self._ordered))

    async def _decide_moves(self) -> str:
        view = self.snapshots.view(self._sequences.values())
        rescues_any = self._policy.rescues
        if rescues_any:
            # They run again where there is room, not where there was none.
            for sequence in (s for s in view.preempted if s.not_movable() is None):
                self._spawn(self._suspend(sequence, "preempted"))
        lead = OomAvoidanceSettings(lead_s=2.0 * self._config.period_s + view.cluster.stall_s)
        # Only where suspension is part of the preset: the others are what they are compared as.
        rescues = avoid_oom(view.cluster, lead, view.running) if rescues_any else []
        preset, decider = self.preset, self.decider
        asked, failed = await self._ask(decider, view)
        if decider is not self.decider:  # another preset was put in force meanwhile
            return "kept"
        moves = exclude_conflicts(asked, rescues)
        self.log.moves(preset, view, decider.policy, lead if rescues_any else None, rescues, moves, failed)
        for one in rescues:
            sequence = view.sequences[one.request]
            self._metrics.rescues.labels("suspended" if one.target == NO_TARGET else "moved").inc()
            if one.target == NO_TARGET:
                self._ordered.append(self._spawn(self._suspend(sequence, f"rescue: {one.reason}")))
            else:
                self._order(sequence, view.instances[one.target], f"rescue: {one.reason}", "rescue")
        for move in moves:
            self._order_move(view, move)
        return "failed" if failed else "moved" if moves or rescues else "kept"

    async def _ask(
        self, decider: Decider[Rebalance, list[MigrationDecision]], view: ClusterSnapshot
    ) -> tuple[list[MigrationDecision], str | None]:
        """Return the moves of the policy, and how it failed, if it did: then there are none, and rescues go on (I7)."""
        try:
            most_s = max(self._config.period_s, _LEAST_TO_DECIDE_S)
            return await decider.decide(view.cluster, most_s=most_s), None
        except DecisionError as error:
            decider.note(error)
            self._metrics.faults.labels("rebalance").inc()
            return [], error.kind

    def _order_move(self, view: ClusterSnapshot, move: MigrationDecision) -> None:
        sequence, target = view.sequences[move.request], view.instances[move.target]
        self._order(sequence, target, f"{self.preset}: {move.reason}", self.preset)

    def _order(self, sequence: Session, target: Instance, reason: str, trigger: str) -> None:
        logger.info("move %s to %s: %s", sequence.id, target.name, reason)
        self._ordered.append(self._spawn(self._attempt(sequence, target, reason, trigger)))

    async def _attempt(self, sequence: Session, target: Instance, reason: str, trigger: str) -> None:
        try:
            await self._move(sequence, target, reason, trigger)
        except Exception as error:  # the policy saw an older state, or the move met a fault: the request goes on
            logger.info("did not move %s: %s", sequence.id, error)


def _queue(instance: Instance) -> int:
    load = instance.state.telemetry
    return load.running + load.waiting if load else 0
