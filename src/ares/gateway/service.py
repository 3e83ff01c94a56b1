"""The gateway's state: instances, running sequences, recent moves; and the choices that need all three."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from ares import wire
from ares.config import GatewayConfig, live_preset
from ares.gateway import engine
from ares.gateway.instances import Instance, Pool
from ares.gateway.metrics import Metrics
from ares.gateway.migration import Migration
from ares.gateway.predictions import Scorekeeper, rows_by_key
from ares.gateway.sampling import Sampling
from ares.gateway.sequence import Emit, Sequence
from ares.gateway.text import TextModel
from ares.gateway.window import Recent
from ares.policy import Cluster, Dispatch, Rebalance, RebalanceSettings, dispatcher, rebalancer

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RECENT_MIGRATIONS = 1000
_SUPERVISION_S = 1.0
COMMANDED = "commanded"
# Sampling defaults that vLLM takes from the model's generation_config.json (config/model.py, 0.32).
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class TargetError(Exception):
    """The wanted target cannot take the request; `status` is the HTTP status that says so."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Gateway:
    """One gateway. `start` and `stop` bracket its life."""

    def __init__(self, config: GatewayConfig, folder: Path) -> None:
        self.config = config
        self.text = TextModel(folder)
        self.metrics = Metrics()
        self.recent = Recent()
        self._scores = Scorekeeper(self.metrics, self.recent.prediction_error_tokens)
        self.migrations: deque[Migration] = deque(maxlen=_RECENT_MIGRATIONS)
        self.sequences: dict[str, Sequence] = {}
        self.sampling_defaults = _sampling_defaults(folder)
        self.preset = ""
        self.pool: Pool
        self._dispatch: Dispatch
        self._rebalance: Rebalance
        self._settings: RebalanceSettings
        self._prefills: dict[str, int] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.use_preset(config.preset)

    async def start(self) -> None:
        """Connect to the instances and start to rebalance."""
        self._http = engine.session()
        self.pool = Pool(self.config.workers, self._http, self.config.telemetry_interval_s)
        self.pool.start()
        self._spawn(self._control())
        self._spawn(self._supervise())

    async def stop(self) -> None:
        """Stop everything that `start` started."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.pool.stop()
        await self._http.close()

    def use_preset(self, name: str) -> None:
        """Switch the policy; ValueError where there is no such preset."""
        chosen = live_preset(name)
        self._dispatch = dispatcher(chosen.dispatch)
        self._rebalance = rebalancer(chosen.rebalance)
        self._settings = chosen.settings
        self._moves_by_itself = chosen.rebalance != "none"
        self.preset = name

    @property
    def maximum_model_tokens(self) -> int | None:
        """Longest sequence that every known instance takes; None before any is known."""
        return min((i.hello.max_model_len for i in self.pool.instances if i.hello), default=None)

    # --- sequences ---

    async def generate(self, name: str, prompt: list[int], sampling: Sampling, emit: Emit) -> None:
        """Run one sequence under a free variant of `name`; see `Sequence.run` for what it raises."""
        free, copy = name, 1
        while free in self.sequences:
            copy += 1
            free = f"{name}#{copy}"
        sequence = Sequence(free, prompt, sampling, self, self.config.handover_timeout_s)
        self.sequences[free] = sequence
        self.metrics.active.inc()
        if sampling.pinned is not None:
            self.metrics.pinned.labels(sampling.pinned).inc()
        try:
            await sequence.run(emit)
            self._scores.finished(sequence)
        finally:
            self._scores.forget(sequence)
            del self.sequences[free]
            self.metrics.active.dec()

    # --- placement (the protocol that a sequence uses) ---

    def prefill(self) -> Instance | None:
        """Return the open prefill instance with the least work; None where the decode instance shall prefill."""
        candidates = [i for i in self.pool.prefill() if i.open]
        # In a pool without separate prefill instances, moving the KV of every prompt would gain nothing.
        if not candidates or all(i.role == "both" for i in self.pool.instances):
            return None
        order = self._prefills
        chosen = min(candidates, key=lambda i: (_queue(i), order.get(i.name, 0)))
        # Of equally busy ones, the one that was chosen longest ago.
        order[chosen.name] = max(order.values(), default=0) + 1
        return chosen

    def decode(self, tokens: int, exclude: set[str]) -> Instance | None:
        """Return the instance that the dispatch policy chooses for a sequence of so many tokens."""
        cluster, instances = self.view(exclude)
        index = self._dispatch(cluster, tokens)
        return instances[index] if index is not None else None

    def view(self, exclude: set[str] = frozenset()) -> tuple[Cluster, list[Instance]]:  # type: ignore[assignment]
        """Return the decode pool as the policy sees it, and its instances in the same order."""
        instances = list(self.pool.decode())
        index = {id(i): n for n, i in enumerate(instances)}
        rows: list[dict[str, wire.Row]] = [
            {r.key: r for r in i.telemetry.rows} if i.telemetry else {} for i in instances
        ]
        promised = np.zeros(len(instances), dtype=np.int64)
        names, location, resident, movable = [], [], [], []
        now = time.monotonic()
        for sequence in self.sequences.values():
            if sequence.incoming is not None and id(sequence.incoming) in index:
                promised[index[id(sequence.incoming)]] += sequence.tokens
            where = index.get(id(sequence.instance))
            if where is None:
                continue
            row = rows[where].pop(sequence.key or "", None)
            names.append(sequence.id)
            location.append(where)
            resident.append(row.resident if row is not None and row.resident else sequence.tokens)
            cool = not sequence.moved_at or now - sequence.moved_at > self.config.cooldown_s
            movable.append(cool and sequence.not_movable() is None)
        for n, strangers in enumerate(rows):  # requests of other gateways
            promised[n] += sum(row.resident for row in strangers.values())
        cluster = Cluster(
            instances=tuple(i.name for i in instances),
            capacity_tokens=np.array([i.capacity_tokens for i in instances], dtype=np.int64),
            promised_tokens=promised,
            open=np.array([i.open and i.name not in exclude for i in instances], dtype=np.bool_),
            requests=tuple(names),
            location=np.array(location, dtype=np.int64),
            resident_tokens=np.array(resident, dtype=np.int64),
            movable=np.array(movable, dtype=np.bool_),
        )
        return cluster, instances

    # --- moves ---

    def check_target(self, sequence: Sequence, target: Instance) -> None:
        """Check that `target` can take the sequence now.

        Raises
        ------
        TargetError
            It is where the sequence runs, does not decode, is not heard of, or has no room.
        """
        if target is sequence.instance:
            raise TargetError(f"the request runs on {target.name} already", 409)
        if target.role == "prefill":
            raise TargetError(f"{target.name} does not decode", 409)
        if not target.open or target.hello is None:
            raise TargetError(f"{target.name} is not taking requests", 503)
        size = target.hello.block_size
        # One block more than the tokens need: the next one is written at once.
        needed = -(-(sequence.tokens + 1) // size) + 1
        promised = sum(-(-(s.tokens + 1) // size) for s in self.sequences.values() if s.incoming is target)
        if needed > target.free_blocks - promised:
            raise TargetError(f"{target.name} is full: {needed} KV blocks wanted, {target.free_blocks} free", 409)

    async def migrate(self, sequence: Sequence, target: Instance, reason: str, trigger: str) -> Migration:
        """Move a sequence; a caller that is cancelled leaves the move to its end.

        Raises
        ------
        TargetError, NotMovableError
            Nothing was changed.
        """
        self.check_target(sequence, target)
        return await asyncio.shield(self._spawn(self._migrate(sequence, target, reason, trigger)))

    async def _migrate(self, sequence: Sequence, target: Instance, reason: str, trigger: str) -> Migration:
        record = await sequence.migrate(target, reason)
        self.migrations.append(record)
        self.metrics.migrations.labels(trigger, record.outcome).inc()
        if record.stall_s is not None:
            self.metrics.stall.observe(record.stall_s)
        self.metrics.pulled.inc(record.pulled_tokens or 0)
        return record

    async def _control(self) -> None:
        """Decide and carry out moves, period after period. A fault costs its period, never the service (I7)."""
        while True:
            await asyncio.sleep(self.config.period_s)
            if not self._moves_by_itself:
                continue
            try:
                result = self._decide()
            except Exception:
                logger.exception("rebalancing failed; serving goes on")
                result = "failed"
            self.metrics.decisions.labels(result).inc()

    async def _supervise(self) -> None:
        """Let sequences give up on instances that have frozen and on KV that does not come."""
        since: dict[str, float] = {}
        while True:
            await asyncio.sleep(_SUPERVISION_S)
            now = time.monotonic()
            rows = [row for i in self.pool.instances if i.telemetry for row in i.telemetry.rows]
            since = {row.key: since.get(row.key, now) for row in rows if row.state == "loading"}
            self._scores.look(self.sequences.values(), rows_by_key(self.pool.instances))
            for sequence in self.sequences.values():
                sequence.supervise(now - since.get(sequence.key or "", now))

    def _decide(self) -> str:
        cluster, instances = self.view()
        moves = self._rebalance(cluster, self._settings)
        for move in moves:
            sequence = self.sequences[cluster.requests[move.request]]
            target = instances[move.target]
            logger.info("move %s to %s: %s", sequence.id, target.name, move.reason)
            self._spawn(self._move(sequence, target, f"{self.preset}: {move.reason}"))
        return "moved" if moves else "kept"

    async def _move(self, sequence: Sequence, target: Instance, reason: str) -> None:
        try:
            await self.migrate(sequence, target, reason, self.preset)
        except Exception as error:  # the policy saw an older state, or the move met a fault: the request goes on
            logger.info("did not move %s: %s", sequence.id, error)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _queue(instance: Instance) -> int:
    load = instance.telemetry
    return load.running + load.waiting if load else 0


def _sampling_defaults(folder: Path) -> dict[str, Any]:
    try:
        read = msgspec.json.decode((folder / "generation_config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        return {}
    return {name: read[name] for name in _DEFAULTS if read.get(name) is not None}
