"""The gateway of one model: its instances, its running sessions and its recent migrations, and what needs all three."""

import asyncio
import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from ares.config import GatewayConfig
from ares.gateway.control.backlog import Backlog, BacklogReservation
from ares.gateway.control.closing import Closing
from ares.gateway.control.controller import Controller
from ares.gateway.control.drain import Drainer
from ares.gateway.control.predictions import PredictionScores, rows_by_key
from ares.gateway.control.role_planner import RolePlanner
from ares.gateway.control.roles import RoleChanges
from ares.gateway.control.snapshot import accepting
from ares.gateway.discovery.membership import Membership, make_sources
from ares.gateway.openai import generation_defaults
from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.parsing import Parsers
from ares.gateway.openai.sampling import Sampling
from ares.gateway.openai.text import Chats, TextModel
from ares.gateway.openai.tokenizer import tokenizer_folder
from ares.gateway.pool.discovery import Served
from ares.gateway.pool.generate import http_client
from ares.gateway.pool.instance import Instance, NoInstanceError
from ares.gateway.pool.pool import Pool
from ares.gateway.pool.pools import Pools
from ares.gateway.processes.shared_counts import SharedCounts
from ares.gateway.records.learners import Learners
from ares.gateway.records.metrics import Metrics
from ares.gateway.records.moves import Moves
from ares.gateway.records.pool_metrics import PoolCollector, PrefixCache
from ares.gateway.records.recording import Recorder
from ares.gateway.records.window import Recent
from ares.gateway.session import precopy
from ares.gateway.session.eligibility import why_ineligible
from ares.gateway.session.handover import MigrationRecord
from ares.gateway.session.length_features import length_features
from ares.gateway.session.objectives import ORDINARY, Objective
from ares.gateway.session.output import Emit
from ares.gateway.session.session import Session
from ares.gateway.shutdown import Shutdown
from ares.gateway.tracing.calls import describe_move
from ares.gateway.tracing.settings import make_tracer
from ares.gateway.tracing.span import NO_SPAN, NO_TRACER, Span, Tracer
from ares.gateway.tuning import DEFAULT, Tuning
from ares.models import resolve as models
from ares.policy.transfer import Mode
from ares.protocol.fields import CLASS_HEADER
from ares.protocol.keys import ControlKey

logger = logging.getLogger(__name__)

T = TypeVar("T")

COMMANDED = "commanded"
# A request's own `priority` may be any 64-bit number; its class adds to it.
_LARGEST_RANK = 2**62


def unknown_model(name: str) -> BadRequestError:
    """Return the error for a name that nothing is served under, in vLLM's words (openai/models/serving.py, 0.32)."""
    return BadRequestError(f"The model `{name}` does not exist.", "model", "model_not_found", 404)


class QueueFullError(NoInstanceError):
    """The requests that wait outside decode have reached their limit, in number or in tokens."""

    code = "queue_full"


class TargetError(Exception):
    """The target cannot take the request; `status` is the HTTP status of the reply."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Gateway:
    """The gateway of one model, from `start` to `stop`. Those of several models are put together in `Models`.

    Parameters
    ----------
    config
        The resolved configuration.
    folder
        Folder of the served model, for its tokenizer.
    tuning
        Times and limits that are no settings.
    parsers
        Parsers of reasoning and tool calls; None: text is given as it is.
    counts
        Those that the processes of the gateway share; None: it is the only one.
    first
        The gateway of the first model, which finds the instances of all and has what they share; None: this is it.

    Attributes
    ----------
    pools, session_ids
        Those of all models.
    vocabulary
        Number of the model's token ids; None where its configuration does not say.
    generation_defaults
        What holds for requests that do not set it.
    """

    def __init__(
        self,
        config: GatewayConfig,
        folder: Path,
        tuning: Tuning = DEFAULT,
        parsers: Parsers | None = None,
        counts: SharedCounts | None = None,
        first: "Gateway | None" = None,
    ) -> None:
        self.config = config
        if first is not None:
            counts = first.counts.of_another_model()
        self.counts: SharedCounts = counts or SharedCounts(keys=len(config.api_keys))
        self.tuning = tuning
        self._folder = folder
        chats = Chats(config.chat_template, config.chat_template_content_format, config.default_chat_template_kwargs)
        self.text = TextModel(tokenizer_folder(config.tokenizer) if config.tokenizer else folder, chats)
        self.vocabulary = models.shape(folder).get("vocab_size")
        self.parsers = parsers
        self.metrics = Metrics()
        self.recent = Recent()
        self.prefix_cache = PrefixCache()
        self.metrics.registry.register(
            PoolCollector(
                self.names[0],
                lambda: self.pool.instances,
                lambda: self.controller.waiting + self.controller.suspended + self.counts.waiting_elsewhere,
                self.prefix_cache,
            )
        )
        self.scores = PredictionScores(self.metrics, self.recent.prediction_error_tokens, tuning.kept_versions)
        self.learners: Learners = Learners(self.metrics, tuning) if first is None else first.learners
        self.migrations: Moves = Moves(tuning.kept_migrations) if first is None else first.migrations
        self.sessions: dict[str, Session] = {}
        self.session_ids: set[str] = set() if first is None else first.session_ids
        self.generation_defaults = generation_defaults.load(
            folder, config.generation_config, config.override_generation_config
        )
        self._first = first
        self.pools: Pools = Pools() if first is None else first.pools
        self.pool: Pool
        self.membership: Membership
        self.controller: Controller
        self.closing: Closing
        self.roles: RoleChanges
        self.role_planner = RolePlanner(self, tuning)
        self.drainer = Drainer(self, self._spawn, tuning)
        self.recorder = Recorder(config.record)
        self.backlog = Backlog(
            lambda session: self.controller.snapshots.median_remaining(session),  # noqa: PLW0108 - made by `start`
            self.counts,
        )
        self.shutdown: Shutdown = Shutdown() if first is None else first.shutdown
        self.tracer: Tracer = NO_TRACER
        self._capacity_tokens = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Connect to the instances and start to rebalance; the gateway of the first model starts before the others."""
        config, first = self.config, self._first
        # In each process its own: it has a thread.
        self.tracer = make_tracer(config.otlp_traces_endpoint, self.name) if first is None else first.tracer
        self.http = http_client(
            config.worker_api_key.get_secret_value() if config.worker_api_key else None, self.tuning
        )
        key = ControlKey(config.control_key.get_secret_value()) if config.control_key else None
        served = self._served()
        urls = config.workers if first is None else []
        self.pool = Pool(urls, self.http, config.telemetry_interval_s, key, self.name, served, self.tuning)
        self.pool.sources = self._sources
        self.pool.all_instances = self.pools.instances
        self.pools.append(served, self.pool)
        if first is None:
            sources = make_sources(config.service_discovery, self.tuning)
            self.membership = Membership(self.pools, config.workers, sources, self.tuning)
            self._spawn(self.membership.run())
        else:
            self.membership, self.pool.changes = first.membership, first.pool.changes
        self.controller = Controller(
            config,
            self.pool,
            self.sessions,
            self.metrics,
            self.migrate,
            self._spawn,
            self.name,
            self.tuning,
            self.counts,
        )
        self.closing = Closing(self.controller.lease, self._spawn, config.telemetry_interval_s, self.tuning)
        self.roles = RoleChanges(self.pool, self.metrics, self.closing, self.tuning)
        logger.info("this gateway is called %s", self.name)
        self.pool.start()
        self._spawn(self.controller.admit_waiting())
        self._spawn(self.controller.rebalancing.run())
        self._spawn(self.controller.copy_running())
        self._spawn(self._supervise())
        self._spawn(self.drainer.run())
        self._spawn(self.roles.run())
        self._spawn(self.role_planner.run())
        if self.counts.processes > 1:
            self._spawn(self.controller.publish_placed())

    async def stop(self) -> None:
        """Stop everything that `start` started."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.controller.lease.end()
        self.recorder.describe(self.config.model, self.controller.preset, self.pool.instances)
        await self.pool.stop()
        await self.http.close()
        self.controller.log.close()
        self.recorder.close()
        if self._first is None:
            await self.tracer.close()

    @property
    def name(self) -> str:
        """Its name at the instances, another one each time a gateway starts: all keys of its requests begin with it."""
        return self.counts.gateway

    @property
    def names(self) -> list[str]:
        """Names that clients call the model by, the first one for replies."""
        return self.config.names

    def adapter(self, name: str | None) -> str | None:
        """Return the LoRA adapter that a client means by the name of a model; None where it means the model itself.

        Raises
        ------
        BadRequestError
            Nothing is served under the name.
        """
        if not name or name in self.names:
            return None
        if name not in self.pool.adapters:
            raise unknown_model(name)
        return name

    def _sources(self) -> str:
        """Return the sources of instances, with what is wrong with each."""
        problems = self.membership.problems
        # Of several models, an instance of `--worker` is another pool's until it says which one it serves.
        given = ["--worker"] if len(self.pools) > 1 and self.config.workers else []
        return ", ".join(
            f"{name} ({problems[name]})" if name in problems else name
            for name in (*given, *self.config.service_discovery)
        )

    def _served(self) -> Served:
        """Return the model that an instance must serve, under one of its names or the name that it was loaded by."""
        model_name = Path(self.config.model).expanduser()
        # A folder by its absolute path, however it was given.
        given = str(model_name.resolve()) if model_name.is_dir() else self.config.model
        return Served((*self.config.served_model_name, given), models.shape(self._folder), self.pools)

    @property
    def maximum_model_tokens(self) -> int | None:
        """Most tokens, prompt and output, that every known instance takes in one sequence; None before any is known."""
        return min((i.state.hello.max_model_len for i in self.pool.instances if i.state.hello), default=None)

    @property
    def maximum_waiting_tokens(self) -> float:
        """Limit of the tokens outside decode, present and expected; infinite before any instance is known.

        While no instance is known any more, the limit stays.
        """
        capacity = sum(i.state.capacity_tokens for i in self.pool.decode_instances)
        self._capacity_tokens = capacity or self._capacity_tokens
        return self.config.maximum_waiting_tokens or self.tuning.backlog_capacities * self._capacity_tokens or math.inf

    @property
    def serving(self) -> bool:
        """Whether there is an instance to decode on."""
        usable = self.pool.ready or accepting(self.pool.decode_instances, ())
        return bool(usable) and self.maximum_model_tokens is not None

    async def wait_until_serving(self) -> None:
        """Wait until there is an instance to decode on.

        Raises
        ------
        NoInstanceError
            None became ready within `maximum_wait_s`, or none may become ready without the operator.
        """
        until = time.monotonic() + self.config.maximum_wait_s
        while not self.serving:
            left_s = until - time.monotonic()
            if left_s <= 0 or not self.pool.may_become_ready():
                waited = f", for {self.config.maximum_wait_s:g} s" if left_s <= 0 else ""
                raise NoInstanceError(f"no decode instance is ready{waited}; GET /ready shows why")
            await self.pool.wait_for_change(min(left_s, self.tuning.serving_check_s))

    def reserve(self, count: int) -> BacklogReservation:
        """Reserve room for so many sequences among the waiting ones.

        It is counted before it is checked: of two processes that reserve the last room at the same time at least one
        sees the other. Both may be refused then.

        Raises
        ------
        QueueFullError
            The limit of the waiting requests would be exceeded, or the limit of their tokens is reached.
        """
        with contextlib.ExitStack() as unless_full:
            reservation = unless_full.enter_context(BacklogReservation(self.backlog, count))
            waiting = self.backlog.everywhere()[0] - count
            if waiting + count > self.config.maximum_waiting:
                wanted = f", and {count} would come" if count > 1 else ""
                raise QueueFullError(f"{waiting} requests wait already{wanted}")
            self.check_backlog_tokens(count)
            unless_full.pop_all()
        return reservation

    def check_backlog_tokens(self, count: int, prompt_tokens: int = 1) -> None:
        """Raise QueueFullError where the tokens of the waiting requests would exceed their limit.

        A request that alone exceeds it is taken where no other one waits.

        Parameters
        ----------
        count
            How many of those that wait, without tokens yet, are the sequences of the request that asks.
        prompt_tokens
            Tokens of all their prompts.
        """
        waiting, tokens = self.backlog.everywhere()
        if tokens and tokens + prompt_tokens > self.maximum_waiting_tokens:
            wanted = f", and {prompt_tokens} would come" if prompt_tokens > 1 else ""
            raise QueueFullError(f"{waiting - count} requests of {tokens} tokens wait already{wanted}")

    @property
    def retry_after_s(self) -> int:
        """Whole seconds after which a refused client may try again: the median wait for a first token."""
        waits = self.recent.ttft_s.values()
        if not waits or not self.backlog.everywhere()[0]:
            return 1
        return min(max(1, math.ceil(statistics.median(waits))), self.tuning.retry_after_s)

    def objective(self, name: str | None, priority: int) -> Objective:
        """Return the objective of a request of a class; BadRequestError where there is no such class.

        `priority` is the request's own, as vLLM has it: smaller goes first.
        """
        config = self.config
        gap_s = config.slo_gap_s
        priority = max(-_LARGEST_RANK, min(priority, _LARGEST_RANK))
        if name is None:
            bound_s = math.inf if gap_s == "none" else gap_s
            return Objective("default", config.slo_ttft_s, config.slo_tpot_s, bound_s, priority)
        chosen = config.classes.get(name)
        if chosen is None:
            known = ", ".join(sorted(config.classes)) or "none"
            raise BadRequestError(f"{CLASS_HEADER}: no class {name!r}; configured: {known}", CLASS_HEADER)
        ttft_s, tpot_s = chosen.ttft_s or config.slo_ttft_s, chosen.tpot_s or config.slo_tpot_s
        gap_s = gap_s if chosen.gap_s is None else chosen.gap_s
        return Objective(name, ttft_s, tpot_s, math.inf if gap_s == "none" else gap_s, chosen.rank + priority)

    # --- sessions ---

    async def generate(
        self,
        name: str,
        prompt: list[int],
        sampling: Sampling,
        emit: Emit,
        objective: Objective = ORDINARY,
        reasoning_tokens: Callable[[], int | None] = lambda: None,
        span: Span = NO_SPAN,
    ) -> int | None:
        """Run one session, called `name`, or `name#2` and so on where there is such a session already.

        Returns the tokens of the prompt that its prefill instance had cached; None where none has reported them.

        `reasoning_tokens` is called once it has ended: tokens of its reasoning, None where they are not counted.
        `span` is that of the request.

        See `Session.run` for what it raises; ShuttingDownError where the gateway ends before it.
        """
        session_id, number = name, 1
        while session_id in self.session_ids:
            number += 1
            session_id = f"{name}#{number}"
        update = self.backlog.update
        session = Session(
            session_id,
            prompt,
            sampling,
            self.controller,
            self.config.handover_timeout_s,
            objective,
            on_phase=update,
            gateway=self.name,
            maximum_attempts=self.config.maximum_attempts,
            tuning=self.tuning,
            length_features=length_features(prompt, sampling) if self.tuning.length_curves else None,
            span=span,
        )
        self.sessions[session_id] = session
        self.session_ids.add(session_id)
        self.metrics.active.inc()
        if sampling.unmovable_reason is not None:
            self.metrics.unmovable.labels(sampling.unmovable_reason).inc()
        try:
            update(session)
            await self.shutdown.run(session.run(emit))
            self._count_parts(session, reasoning_tokens())
            if len(session.emitted) > 1:
                self.metrics.longest_gap.labels(objective.name).observe(session.output.longest_gap_s)
                self.recent.longest_gap_s.add(session.output.longest_gap_s)
            self.recorder.record(session)
            self.prefix_cache.add(len(prompt), session.placement.cached_tokens)
            return session.placement.cached_tokens
        finally:
            self.scores.forget(session)
            self.backlog.remove(session)
            del self.sessions[session_id]
            self.session_ids.discard(session_id)
            self.controller.wake_admission()
            self.metrics.active.dec()
            self.metrics.step_tokens.inc(session.output.step_tokens)
            self.controller.record_output(session)

    def _count_parts(self, session: Session, reasoning_tokens: int | None) -> None:
        """Count the reasoning and the answer of a complete output, and the errors of what was predicted for each."""
        self.scores.score(session, reasoning_tokens)
        if reasoning_tokens is not None:
            self.metrics.part_tokens.labels("reasoning").inc(reasoning_tokens)
            self.metrics.part_tokens.labels("answer").inc(max(0, len(session.emitted) - reasoning_tokens))

    # --- moves ---

    def check_target(self, session: Session, target: Instance) -> None:
        """Check that `target` can take the session now.

        Raises
        ------
        TargetError
            The session runs there already; or it serves another model, does not decode, takes no work, has too few free
            KV blocks, or cannot continue the request (eligibility.py).
        """
        if not self.pool.watches(target):
            raise TargetError(f"{target.name} does not serve {self.names[0]}: requests do not move between models", 409)
        if target is session.instance:
            raise TargetError(f"the request runs on {target.name} already", 409)
        if not target.does("decode"):
            problem = "is about to prefill only" if target.next_role else "does not decode"
            raise TargetError(f"{target.name} {problem}", 409)
        if not target.open or target.state.hello is None:
            raise TargetError(f"{target.name} is not taking requests", 503)
        kv = session.instance.state.settings if session.instance is not None else None
        if (why := why_ineligible(session.placement, target.state, kv)) is not None:
            raise TargetError(f"{target.name} {why}", 409)
        blocks = target.state.layout.blocks
        # One block of each group more than the tokens need: the next one is written at once.
        needed = blocks(session.tokens + 1) + max(1, len(target.state.layout.groups))
        reserved = sum(blocks(s.tokens + 1) for s in self.sessions.values() if s.incoming is target)
        if needed > target.state.free_blocks - reserved:
            raise TargetError(f"{target.name} is full: {needed} KV blocks wanted, {target.state.free_blocks} free", 409)

    def takes(self, session: Session, target: Instance) -> bool:
        """Whether `target` can take the session now."""
        try:
            self.check_target(session, target)
        except TargetError:
            return False
        return True

    async def migrate(
        self, session: Session, target: Instance, reason: str, trigger: str, mode: precopy.WantedMode = precopy.AUTO
    ) -> MigrationRecord:
        """Migrate a session, if it can be now; the migration continues when its caller is cancelled.

        Three layers: this one checks the target and chooses the mode, `precopy.migrate` copies the full blocks ahead
        where that is the mode, and `Handovers.hand_over` moves the running request.

        Raises
        ------
        TargetError, NotMovableError
            Nothing was changed.
        """
        self.check_target(session, target)
        mode_used = precopy.resolve_mode(mode, session, target)
        return await asyncio.shield(self._spawn(self._migrate_and_record(session, target, reason, trigger, mode_used)))

    async def _migrate_and_record(
        self, session: Session, target: Instance, reason: str, trigger: str, mode: Mode
    ) -> MigrationRecord:
        source = session.instance
        commanded, commanded_until = trigger == COMMANDED, session.commanded_until
        if commanded:
            session.commanded_until = math.inf  # from its arrival on, which is before this coroutine resumes
        try:
            with session.span.child("migration", {"ares.trigger": trigger, "ares.reason": reason}) as span:
                span.set({"ares.source": source.name if source else None, "ares.target": target.name})
                record = await precopy.migrate(session, target, reason, mode, self.config.handover_timeout_s, span)
                describe_move(span, record)
            if record.outcome == "moved":
                commanded_until = session.moved_at + self.config.commanded_cooldown_s
        finally:
            if commanded:
                session.commanded_until = commanded_until
        self.migrations.append(record)
        self.metrics.migrations.labels(trigger, record.outcome).inc()
        if record.stall_s is not None:
            self.metrics.stall.observe(record.stall_s)
            if record.pulled_tokens:
                self.controller.snapshots.transfer_time.observe(record.pulled_tokens, record.stall_s)
        self.metrics.pulled.inc(record.pulled_tokens or 0)
        self.metrics.precopied.inc(record.precopied_tokens)
        return record

    async def _supervise(self) -> None:
        """Let sessions give up on frozen instances and overdue answers."""
        since: dict[str, float] = {}
        period_s = self.tuning.supervision_s
        while True:
            slept = time.monotonic()
            await asyncio.sleep(period_s)
            late = time.monotonic() - slept - period_s
            if late > period_s:
                # The gateway itself did not run: what instances sent meanwhile is not read yet.
                logger.warning("the event loop of the gateway did not run for %.1f s", late)
                since = {what: at + late for what, at in since.items()}
                for instance in self.pool.instances:
                    instance.health.extend_deadline(late)
            try:
                since = self._supervise_once(since)
            except Exception:  # only this round fails, not the service (I7)
                logger.exception("cannot supervise the sessions")
                self.metrics.faults.labels("supervision").inc()

    def _supervise_once(self, since: dict[str, float]) -> dict[str, float]:
        """Supervise every session once; `since` and the result map overdue answers to when they became overdue."""
        now, seen = time.monotonic(), dict[str, float]()
        rows = rows_by_key(self.pool.instances)
        for session in self.sessions.values():
            overdue = session.overdue(rows)
            if overdue is not None:
                seen[overdue] = since.get(overdue, now)
            session.supervise(now - seen[overdue] if overdue is not None else 0.0)
        self.scores.record(self.sessions.values(), rows)
        self.learners.check()
        return seen

    def _spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
