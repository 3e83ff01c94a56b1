"""The gateway's state: instances, running sequences, recent moves; and the choices that need all three."""

import asyncio
import logging
import math
import statistics
import time
import uuid
from collections import deque
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ares.config import GatewayConfig
from ares.gateway.control.backlog import Backlog
from ares.gateway.control.controller import Controller
from ares.gateway.control.drain import Drainer
from ares.gateway.control.predictions import PredictionScores, rows_by_key
from ares.gateway.control.snapshot import taking
from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.sampling import Sampling
from ares.gateway.openai.text import TextModel
from ares.gateway.pool import generate as engine
from ares.gateway.pool.discovery import Served
from ares.gateway.pool.instance import Instance, NoInstanceError
from ares.gateway.pool.pool import Pool
from ares.gateway.records.metrics import Metrics
from ares.gateway.records.recording import Recorder
from ares.gateway.records.window import Recent
from ares.gateway.session import precopy
from ares.gateway.session.handover import MigrationRecord
from ares.gateway.session.objectives import ORDINARY, Objective
from ares.gateway.session.placement import Emit
from ares.gateway.session.session import Session
from ares.gateway.shutdown import Shutdown
from ares.models import resolve as model
from ares.policy.transfer import Mode
from ares.protocol.keys import ControlKey

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RECENT_MIGRATIONS = 1000
_SUPERVISION_S = 1.0
# Those who wait for an instance look as often as this, and whenever one changes its state.
_LOOK_S = 0.5
_LONGEST_RETRY_S = 120
# As often as this may the waiting fill the memory of the decode pool, where the configuration does not say.
_FILLINGS = 16
COMMANDED = "commanded"
# Sampling defaults that vLLM takes from the model's generation_config.json (config/model.py, 0.32).
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class QueueFullError(NoInstanceError):
    """As much waits as may."""

    code = "queue_full"


class TargetError(Exception):
    """The wanted target cannot take the request; `status` is the HTTP status that says so."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Gateway:
    """One gateway. `start` and `stop` bracket its life; another life has another `name`."""

    def __init__(self, config: GatewayConfig, folder: Path) -> None:
        self.config = config
        self._folder = folder
        self.name = uuid.uuid4().hex[:8]
        self.text = TextModel(folder)
        self.metrics = Metrics()
        self.recent = Recent()
        self._scores = PredictionScores(self.metrics, self.recent.prediction_error_tokens)
        self.migrations: deque[MigrationRecord] = deque(maxlen=_RECENT_MIGRATIONS)
        self.sequences: dict[str, Session] = {}
        self.sampling_defaults = _sampling_defaults(folder)
        self.pool: Pool
        self.controller: Controller
        self.drainer = Drainer(self, self._spawn)
        self.recorder = Recorder(config.record)
        self.backlog = Backlog(lambda sequence: self.controller.snapshots.remaining(sequence, None)[1])
        self.shutdown = Shutdown()
        self._capacity_tokens = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Connect to the instances and start to rebalance."""
        config = self.config
        self._http = engine.session(config.worker_api_key.get_secret_value() if config.worker_api_key else None)
        key = ControlKey(config.control_key.get_secret_value()) if config.control_key else None
        self.pool = Pool(config.workers, self._http, config.telemetry_interval_s, key, self.name, self._served())
        self.controller = Controller(
            config, self.pool, self.sequences, self.metrics, self.migrate, self._spawn, self.name
        )
        logger.info("this gateway is called %s", self.name)
        self.pool.start()
        self._spawn(self.controller.let_in())
        self._spawn(self.controller.rebalance())
        self._spawn(self._supervise())
        self._spawn(self.drainer.run())

    async def stop(self) -> None:
        """Stop everything that `start` started."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.controller.lease.give_back()
        self.recorder.describe(self.config.model, self.controller.preset, self.pool.instances)
        await self.pool.stop()
        await self._http.close()
        self.controller.log.close()
        self.recorder.close()

    @property
    def names(self) -> list[str]:
        """Names that clients call the model by, the first one for replies."""
        return self.config.served_model_name or [self.config.model]

    def _served(self) -> Served:
        """Return what an instance must serve: the model by one of its names, or the one that it was loaded by."""
        model_name = Path(self.config.model).expanduser()
        # However it was given, a folder is a place on this host.
        given = str(model_name.resolve()) if model_name.is_dir() else self.config.model
        return Served((*self.config.served_model_name, given), model.shape(self._folder))

    @property
    def maximum_model_tokens(self) -> int | None:
        """Longest sequence that every known instance takes; None before any is known."""
        return min((i.state.hello.max_model_len for i in self.pool.instances if i.state.hello), default=None)

    @property
    def waiting(self) -> int:
        """How many sequences wait outside decode, in the queues of instances too."""
        return len(self.backlog)

    @property
    def maximum_waiting_tokens(self) -> float:
        """Tokens that the waiting may bring and be expected to generate; infinite before any instance is known.

        While all are away, the limit is the one before.
        """
        capacity = sum(i.state.capacity_tokens for i in self.pool.decode())
        self._capacity_tokens = capacity or self._capacity_tokens
        return self.config.maximum_waiting_tokens or _FILLINGS * self._capacity_tokens or math.inf

    @property
    def serving(self) -> bool:
        """Whether there is an instance to decode on."""
        return bool(taking(list(self.pool.decode()), ())) and self.maximum_model_tokens is not None

    async def until_serving(self) -> None:
        """Wait until there is an instance to decode on.

        Raises
        ------
        NoInstanceError
            None came for `maximum_wait_s`; or none will by itself: each has never been ready, or cannot be used.
        """
        until = time.monotonic() + self.config.maximum_wait_s
        while not self.serving:
            left_s = until - time.monotonic()
            if left_s <= 0 or not self.pool.expected():
                waited = f", for {self.config.maximum_wait_s:g} s" if left_s <= 0 else ""
                raise NoInstanceError(f"no decode instance is ready{waited}; GET /ready says why")
            await self.pool.change(min(left_s, _LOOK_S))

    def check_queue(self) -> None:
        """Raise QueueFullError where as much waits as may."""
        if self.waiting >= self.config.maximum_waiting:
            raise QueueFullError(f"{self.waiting} requests wait already")
        self.check_work()

    def check_work(self) -> None:
        """Raise QueueFullError where what waits has as many tokens as it may."""
        if self.backlog.tokens >= self.maximum_waiting_tokens:
            raise QueueFullError(f"{self.waiting} requests of {self.backlog.tokens} tokens wait already")

    @property
    def retry_after_s(self) -> int:
        """Whole seconds after which somebody who was refused may come again: the median wait for a first token."""
        waits = self.recent.ttft_s.values()
        return min(max(1, math.ceil(statistics.median(waits))), _LONGEST_RETRY_S) if waits and self.waiting else 1

    def objective(self, name: str | None, priority: int) -> Objective:
        """Return what a request of a class is to achieve; BadRequestError where there is no such class.

        `priority` is the request's own, as vLLM has it: smaller goes first.
        """
        config = self.config
        gap_s = config.slo_gap_s
        if name is None:
            bound_s = math.inf if gap_s == "none" else gap_s
            return Objective("default", config.slo_ttft_s, config.slo_tpot_s, bound_s, priority)
        chosen = config.classes.get(name)
        if chosen is None:
            known = ", ".join(sorted(config.classes)) or "none"
            raise BadRequestError(f"x-ares-class: no class {name!r}; configured: {known}", "x-ares-class")
        ttft_s, tpot_s = chosen.ttft_s or config.slo_ttft_s, chosen.tpot_s or config.slo_tpot_s
        gap_s = gap_s if chosen.gap_s is None else chosen.gap_s
        return Objective(name, ttft_s, tpot_s, math.inf if gap_s == "none" else gap_s, chosen.rank + priority)

    # --- sequences ---

    async def generate(
        self, name: str, prompt: list[int], sampling: Sampling, emit: Emit, objective: Objective = ORDINARY
    ) -> None:
        """Run one sequence under a free variant of `name`.

        See `Session.run` for what it raises; ShuttingDownError where the gateway ends before it.
        """
        free, copy = name, 1
        while free in self.sequences:
            copy += 1
            free = f"{name}#{copy}"
        note = self.backlog.note
        sequence = Session(
            free,
            prompt,
            sampling,
            self.controller,
            self.config.handover_timeout_s,
            objective,
            on_phase=note,
            gateway=self.name,
            maximum_attempts=self.config.maximum_attempts,
        )
        self.sequences[free] = sequence
        self.metrics.active.inc()
        if sampling.pinned is not None:
            self.metrics.pinned.labels(sampling.pinned).inc()
        try:
            note(sequence)
            await self.shutdown.bound(sequence.run(emit))
            self._scores.finished(sequence)
            if len(sequence.emitted) > 1:
                self.metrics.longest_gap.labels(objective.name).observe(sequence.longest_gap_s)
                self.recent.longest_gap_s.add(sequence.longest_gap_s)
            self.controller.ended(len(sequence.emitted))
            self.recorder.finished(sequence)
        finally:
            self._scores.forget(sequence)
            self.backlog.forget(sequence)
            del self.sequences[free]
            self.controller.changed()
            self.metrics.active.dec()

    # --- moves ---

    def check_target(self, sequence: Session, target: Instance) -> None:
        """Check that `target` can take the sequence now.

        Raises
        ------
        TargetError
            It is where the sequence runs, does not decode, is not heard of, has no room, or joined after the sequence
            had begun and does not restore its state.
        """
        if target is sequence.instance:
            raise TargetError(f"the request runs on {target.name} already", 409)
        if target.role == "prefill":
            raise TargetError(f"{target.name} does not decode", 409)
        if not target.open or target.state.hello is None:
            raise TargetError(f"{target.name} is not taking requests", 503)
        if lacking := target.state.lacks(sequence.sampling.needs):
            raise TargetError(f"{target.name} does not restore {', '.join(sorted(lacking))} of the request", 409)
        size = target.state.hello.block_size
        # One block more than the tokens need: the next one is written at once.
        needed = -(-(sequence.tokens + 1) // size) + 1
        promised = sum(-(-(s.tokens + 1) // size) for s in self.sequences.values() if s.incoming is target)
        if needed > target.state.free_blocks - promised:
            raise TargetError(f"{target.name} is full: {needed} KV blocks wanted, {target.state.free_blocks} free", 409)

    def takes(self, sequence: Session, target: Instance) -> bool:
        """Whether `target` can take the sequence now."""
        try:
            self.check_target(sequence, target)
        except TargetError:
            return False
        return True

    async def migrate(
        self, sequence: Session, target: Instance, reason: str, trigger: str, mode: precopy.WantedMode = precopy.AUTO
    ) -> MigrationRecord:
        """Move a sequence; a caller that is cancelled leaves the move to its end.

        Raises
        ------
        TargetError, NotMovableError
            Nothing was changed.
        """
        self.check_target(sequence, target)
        how = precopy.resolve(mode, sequence, target)
        return await asyncio.shield(self._spawn(self._migrate(sequence, target, reason, trigger, how)))

    async def _migrate(
        self, sequence: Session, target: Instance, reason: str, trigger: str, mode: Mode
    ) -> MigrationRecord:
        commanded, rests_until = trigger == COMMANDED, sequence.rests_until
        if commanded:
            sequence.rests_until = math.inf  # it rests from its arrival on, which is before this move is over
        try:
            record = await precopy.move(sequence, target, reason, mode, self.config.handover_timeout_s)
            if record.outcome == "moved":
                rests_until = sequence.moved_at + self.config.commanded_cooldown_s
        finally:
            if commanded:
                sequence.rests_until = rests_until
        self.migrations.append(record)
        self.metrics.migrations.labels(trigger, record.outcome).inc()
        if record.stall_s is not None:
            self.metrics.stall.observe(record.stall_s)
            if record.pulled_tokens:
                self.controller.snapshots.transfer.observe(record.pulled_tokens, record.stall_s)
        self.metrics.pulled.inc(record.pulled_tokens or 0)
        self.metrics.precopied.inc(record.precopied_tokens)
        return record

    async def _supervise(self) -> None:
        """Let sequences give up on instances that have frozen and on what does not come."""
        since: dict[str, float] = {}
        while True:
            slept = time.monotonic()
            await asyncio.sleep(_SUPERVISION_S)
            late = time.monotonic() - slept - _SUPERVISION_S
            if late > _SUPERVISION_S:
                # The gateway itself stood still: nobody was silent meanwhile, it has only not listened.
                logger.warning("stood still for %.1f s", late)
                since = {what: at + late for what, at in since.items()}
                for instance in self.pool.instances:
                    instance.health.extend_deadline(late)
            try:
                since = self._look_after(since)
            except Exception:  # costs this look, never the service (I7)
                logger.exception("cannot look after the sequences")
                self.metrics.faults.labels("supervision").inc()

    def _look_after(self, since: dict[str, float]) -> dict[str, float]:
        """Look once; `since` and what is returned tell since when what is overdue has been so."""
        now, seen = time.monotonic(), dict[str, float]()
        rows = rows_by_key(self.pool.instances)
        for sequence in self.sequences.values():
            overdue = sequence.overdue(rows)
            if overdue is not None:
                seen[overdue] = since.get(overdue, now)
            sequence.supervise(now - seen[overdue] if overdue is not None else 0.0)
        self._scores.look(self.sequences.values(), rows)
        return seen

    def _spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _sampling_defaults(folder: Path) -> dict[str, Any]:
    try:
        read = msgspec.json.decode((folder / "generation_config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        return {}
    return {name: read[name] for name in _DEFAULTS if read.get(name) is not None}
