"""The live controller: who enters decode and where, who moves, who gives way. It decides; sequences carry it out.

Of several gateways before one pool each lets its own sequences in; they decide moves in turns (gateway/lease.py).

A fault in a decision costs that decision and never the service (I7): whoever waits is then let in by plain dispatch.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ares.config import GatewayConfig, live_preset
from ares.gateway import lengths
from ares.gateway.compile_ahead import compile_ahead
from ares.gateway.deciding import Decider
from ares.gateway.decisions import DecisionLog
from ares.gateway.entering import Entering
from ares.gateway.instances import Instance, NoInstanceError
from ares.gateway.lease import Lease
from ares.gateway.metrics import Metrics
from ares.gateway.migration import NotMovableError
from ares.gateway.pool import Pool
from ares.gateway.sequence import Sequence
from ares.gateway.view import View, Viewer, taking
from ares.policy import PRESETS, DecisionError, Dispatch, Move, Preset, dispatcher, rebalancer
from ares.policy.admission import Entrance, Entry, memory_time
from ares.policy.rescue import NOWHERE, RescueSettings, beside, rescue
from ares.policy.rescue import prepare as prepare_rescue

logger = logging.getLogger(__name__)

# One that was blamed for a broken stream is heard again within so long, if it is alive.
_BLAMED_S = 3.0
_LOOK_S = 0.2
# Entrance is decided when something has changed, but not all the time, and now and then in any case.
_SHORTEST_S, _LONGEST_S = 0.002, 0.25
# A policy may take a period to decide its moves, and in any case so long: the processor may be busy with others.
_LEAST_TO_DECIDE_S = 0.5
# And it takes at most this share of a core.
_SHARE = 0.1
# vLLM's priority is a signed 64-bit number in a JSON body; far below what a double holds exactly.
_LARGEST_PRIORITY = 1 << 40


@dataclass(frozen=True, slots=True)
class _Held:
    """One that waits for the entrance; instances in `exclude` it does not enter."""

    sequence: Sequence
    admitted: asyncio.Future[Instance]
    exclude: set[str]


class NoRoomError(NoInstanceError):
    """The instances are there, and there was no room on them for too long."""

    code = "waited_too_long"


MoveOrder = Callable[[Sequence, Instance, str, str], Coroutine[Any, Any, Any]]


def prepare(chosen: Preset) -> None:
    """Compile what a preset decides with.

    It takes some ten seconds where nothing is in the cache of compiled code: call it in a thread while streams run.
    """
    if _looks_ahead(chosen):
        compile_ahead()
        lengths.prepare()
    rebalancer(chosen.rebalance, chosen.settings)
    if "forecast" in (chosen.admission, chosen.dispatch):
        from ares.policy.admission import loop  # imports numba, where it is installed

        loop.prepare()
    if chosen.suspends:
        prepare_rescue()


def _looks_ahead(chosen: Preset) -> bool:
    """Whether what is left of every running request is asked for all the time."""
    return chosen.moves or "forecast" in (chosen.admission, chosen.dispatch)


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
        sequences: Mapping[str, Sequence],
        metrics: Metrics,
        move: MoveOrder,
        spawn: Callable[[Coroutine[Any, Any, Any]], "asyncio.Task[Any]"],
        name: str,
    ) -> None:
        self.viewer = Viewer(pool, metrics, name)
        self.lease = Lease(pool, name)
        self.log = DecisionLog(config.decision_log)
        self._config, self._pool, self._sequences, self._metrics = config, pool, sequences, metrics
        self._move, self._spawn = move, spawn
        self._held: dict[str, _Held] = {}
        self._changed = asyncio.Event()
        self._prefills: dict[str, int] = {}
        # What the newest decision has set going.
        self._ordered: list[asyncio.Task[Any]] = []
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
        chosen = self._policy
        prepare(chosen)
        if _looks_ahead(chosen):
            self.viewer.lengths.compile()
        self._dispatch: Dispatch = dispatcher(chosen.dispatch)
        self._forecasts = chosen.dispatch == "forecast"
        self.decider = Decider(rebalancer(chosen.rebalance, chosen.settings))
        self.viewer.cooldown_s = self._config.cooldown(chosen)
        suspension = chosen.suspend_settings.for_objectives(self._config.slo_ttft_s)
        self._entrance = Entrance(chosen.admission_settings, suspension if chosen.suspends else None, chosen.queue)
        self._changed.set()

    @property
    def in_force(self) -> dict[str, Any]:
        """The preset with all its settings, and the gateway's own that decide with it; seconds, None for no bound."""
        config = self._config
        return {
            "preset": asdict(self._policy),
            "period_s": config.period_s,
            "cooldown_s": self.viewer.cooldown_s,
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
        assert isinstance(sequence, Sequence)  # noqa: S101 - for the type checker: there are no others
        unfit = self._unfit(sequence)
        # Where others have just failed it, it is better told soon than late.
        most_s = _BLAMED_S if exclude or not self._pool.expected(unfit) else self._config.maximum_wait_s
        exclude = exclude | unfit
        if self._policy.admission == "open":
            instance = await self._soon(lambda: self._place(sequence, exclude), most_s)
        else:
            if exclude:
                await self._soon(lambda: next(iter(taking(list(self._pool.decode()), exclude)), None), most_s)
            instance = await self._admitted(sequence, exclude)
        if self._policy.queue == "volume":
            middle = self.viewer.remaining(sequence, None)[1]
            sequence.priority = min(int(memory_time(float(sequence.tokens), middle)), _LARGEST_PRIORITY)
        else:
            sequence.priority = 0
        return instance

    async def _soon(self, find: Callable[[], Instance | None], most_s: float) -> Instance:
        """Find an instance, within so many seconds."""
        until = time.monotonic() + most_s
        while (instance := find()) is None:
            if time.monotonic() > until:
                raise NoInstanceError("no decode instance is ready")
            await self._pool.change(_LOOK_S)
        return instance

    def elsewhere(self, sequence: Sequence, exclude: set[str]) -> Instance | None:
        """Return where dispatch would put a running sequence now, but for the instances named."""
        return self._place(sequence, exclude)

    def _unfit(self, sequence: Sequence) -> set[str]:
        """Return the names of instances that would not restore a sequence's state: they joined after it had begun."""
        return {i.name for i in self._pool.decode() if i.lacks(sequence.sampling.needs)}

    def _place(self, sequence: Sequence, exclude: set[str]) -> Instance | None:
        others = (s for s in self._sequences.values() if s is not sequence)
        try:
            view = self.viewer.view(others, exclude) if self._forecasts else self.viewer.loads(others, exclude)
            index = self._dispatch(view.cluster, sequence.tokens)
        except Exception:
            logger.exception("dispatch failed; the instance with the fewest requests takes it")
            self._metrics.faults.labels("dispatch").inc()
            return self._fewest(exclude)
        return view.instances[index] if index is not None else None

    def _fewest(self, exclude: set[str]) -> Instance | None:
        """Return the instance with the fewest of our sequences: a choice that needs neither policy nor telemetry."""
        used = Counter(id(s.instance or s.destination) for s in self._sequences.values())
        return min(taking(list(self._pool.decode()), exclude), key=lambda i: used[id(i)], default=None)

    async def _admitted(self, sequence: Sequence, exclude: set[str]) -> Instance:
        """Wait for the entrance to let the sequence in."""
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

    # --- the entrance ---

    async def let_in(self) -> None:
        """Let sequences into decode, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(_LONGEST_S if self._held else None):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            pause = 0.0
            if self._held:  # whoever comes next does not wait for a decision about nobody
                begun = time.perf_counter()
                try:
                    self._decide_entries()
                except Exception:
                    logger.exception("admission failed; those who wait are dispatched")
                    self._metrics.faults.labels("entrance").inc()
                    self._open_the_doors()
                took = time.perf_counter() - begun
                pause = max(_SHORTEST_S, took / _SHARE - took)
            self._metrics.held.set(self.held)
            self._metrics.suspended.set(self.suspended)
            await asyncio.sleep(pause)

    def _decide_entries(self) -> None:
        if self._policy.admission == "open":
            self._open_the_doors()
            return
        held = [one for one in self._held.values() if not one.admitted.done()]
        waiting = [one.sequence for one in held]
        excludes = [one.exclude | self._unfit(one.sequence) for one in held]
        view = self.viewer.view(s for s in self._sequences.values() if s.id not in self._held)
        candidates = self.viewer.candidates(waiting, view.cluster, excludes)
        credit = self._entrance.age_credit
        entries = self._entrance.decide(view.cluster, candidates, view.running)
        self.log.entries(self.preset, self._entrance, credit, view, candidates, entries)
        for entry in entries:
            self._metrics.entries.labels(entry.kind).inc()
            self._carry_out(entry, view, waiting)

    def _carry_out(self, entry: Entry, view: View, waiting: list[Sequence]) -> None:
        instance = view.instances[entry.instance]
        if entry.kind == "suspend":
            self._spawn(self._suspend(view.sequences[entry.index], entry.reason))
            return
        sequence = waiting[entry.index]
        if entry.kind == "resume":
            logger.info("%s %s on %s: %s", entry.kind, sequence.id, instance.name, entry.reason)
        self._let(sequence, instance)

    def _let(self, sequence: Sequence, instance: Instance) -> None:
        admitted = self._held.pop(sequence.id).admitted
        sequence.destination = instance
        if not admitted.done():
            admitted.set_result(instance)

    def _open_the_doors(self) -> None:
        """Let in everybody who waits, by plain dispatch; whoever finds no open instance goes on waiting."""
        for held in list(self._held.values()):
            instance = self._place(held.sequence, held.exclude | self._unfit(held.sequence))
            if instance is not None:
                self._let(held.sequence, instance)

    async def _suspend(self, sequence: Sequence, reason: str) -> None:
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
        view = self.viewer.view(self._sequences.values())
        suspends = self._policy.suspends
        if suspends:
            # They run again where there is room, not where there was none.
            for sequence in (s for s in view.preempted if s.not_movable() is None):
                self._spawn(self._suspend(sequence, "preempted"))
        lead = RescueSettings(lead_s=2.0 * self._config.period_s + view.cluster.stall_s)
        # Only where suspension is part of the preset: the others are what they are compared as.
        rescues = rescue(view.cluster, lead, view.running) if suspends else []
        preset, decider = self.preset, self.decider
        asked, failed = await self._ask(decider, view)
        if decider is not self.decider:  # another preset was put in force meanwhile
            return "kept"
        moves = beside(asked, rescues)
        self.log.moves(preset, view, decider.policy, lead if suspends else None, rescues, moves, failed)
        for one in rescues:
            sequence = view.sequences[one.request]
            self._metrics.rescues.labels("suspended" if one.target == NOWHERE else "moved").inc()
            if one.target == NOWHERE:
                self._ordered.append(self._spawn(self._suspend(sequence, f"rescue: {one.reason}")))
            else:
                self._order(sequence, view.instances[one.target], f"rescue: {one.reason}", "rescue")
        for move in moves:
            self._order_move(view, move)
        return "failed" if failed else "moved" if moves or rescues else "kept"

    async def _ask(self, decider: Decider, view: View) -> tuple[list[Move], str | None]:
        """Return the moves of the policy, and how it failed, if it did: then there are none, and rescues go on (I7)."""
        try:
            return await decider.decide(view.cluster, max(self._config.period_s, _LEAST_TO_DECIDE_S)), None
        except DecisionError as error:
            decider.note(error)
            self._metrics.faults.labels("rebalance").inc()
            return [], error.kind

    def _order_move(self, view: View, move: Move) -> None:
        sequence, target = view.sequences[move.request], view.instances[move.target]
        self._order(sequence, target, f"{self.preset}: {move.reason}", self.preset)

    def _order(self, sequence: Sequence, target: Instance, reason: str, trigger: str) -> None:
        logger.info("move %s to %s: %s", sequence.id, target.name, reason)
        self._ordered.append(self._spawn(self._attempt(sequence, target, reason, trigger)))

    async def _attempt(self, sequence: Sequence, target: Instance, reason: str, trigger: str) -> None:
        try:
            await self._move(sequence, target, reason, trigger)
        except Exception as error:  # the policy saw an older state, or the move met a fault: the request goes on
            logger.info("did not move %s: %s", sequence.id, error)


def _queue(instance: Instance) -> int:
    load = instance.telemetry
    return load.running + load.waiting if load else 0
