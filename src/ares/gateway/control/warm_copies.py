"""Warm copies: full KV blocks of running requests go to the prefix caches of other instances, as a policy decides.

Where a request loses its instance or is suspended, it can resume there (gateway/control/prefill_candidates.py). A copy
is the first half of a pre-copied move (gateway/session/precopy.py): the target pulls what it does not have cached, so
that a later copy brings the new blocks alone. Each gateway copies for its own requests.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple

import numpy as np

from ares.gateway.control.decider import Decider
from ares.gateway.control.prefill_choice import cached_tokens
from ares.gateway.control.snapshot import ClusterSnapshot, SnapshotBuilder
from ares.gateway.pool.delta import EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import Pool
from ares.gateway.records.metrics import Metrics
from ares.gateway.session import precopy
from ares.gateway.session.eligibility import why_ineligible
from ares.gateway.session.handover import HandoverError
from ares.gateway.session.session import Session
from ares.gateway.tuning import Tuning
from ares.policy import Copies, Copyable, CopyDecision, DecisionError, decide_copies

logger = logging.getLogger(__name__)

Log = Callable[[Copies, dict[str, float], ClusterSnapshot, Copyable, list[CopyDecision]], None]
# The budget of the link gains for this long at most while nothing is copied.
_BUDGET_S = 1.0
# What is cached of a long request takes a part of a millisecond to look up: after so many seconds, streams go on first.
_LOOKS_UP_S = 0.002


class WarmCopy(NamedTuple):
    """Where a request's KV is copied to, and how many of its tokens are thought to be there."""

    instance: str
    tokens: int


def warm_copy(session: Session) -> WarmCopy | None:
    """Return the warm copy of a request; None: it has none."""
    where = session.copied_to
    if where is None or where is session.instance or not where.takes("decode"):
        return None
    tokens = int(cached_tokens(session.placement, [where])[0])
    return WarmCopy(where.name, tokens) if tokens else None


class WarmCopies:
    """Carries out what one copy policy decides, while older copies are under way.

    Parameters
    ----------
    policy
        The policy.
    pool, sessions, metrics, snapshots, tuning
        The gateway's.
    spawn
        Runs a coroutine in the background of the gateway.
    processes
        Of the gateway, which share the budget.
    log
        Called with each decision: the policy, its memory before it, its arguments and the copies.

    Attributes
    ----------
    looked_up_s
        Seconds that the newest decision has looked up what is cached.
    """

    def __init__(
        self,
        policy: Copies,
        pool: Pool,
        sessions: Mapping[str, Session],
        metrics: Metrics,
        snapshots: SnapshotBuilder,
        tuning: Tuning,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        processes: int,
        log: Log,
    ) -> None:
        self.decider: Decider[Copies, list[CopyDecision]] = Decider(policy, decide_copies)
        self._pool, self._sessions, self._metrics, self._snapshots = pool, sessions, metrics, snapshots
        self._tuning, self._spawn, self._log = tuning, spawn, log
        self.looked_up_s = 0.0
        # Copies to each instance, and the tokens that they bring.
        self._under_way: Counter[Instance] = Counter()
        self._under_way_tokens: Counter[Instance] = Counter()
        self._processes = processes
        self._bytes_s = policy.link_bytes_s(policy.settings) / processes
        self._bytes = 0.0
        self._gained_at = time.monotonic()

    async def decide(self, token_s: float) -> None:
        """Decide once, and start the copies. A prompt's token takes `token_s` seconds."""
        now = time.monotonic()
        gained = self._bytes_s * (now - self._gained_at)
        self._bytes, self._gained_at = min(self._bytes + gained, self._bytes_s * _BUDGET_S), now
        snapshot = self._snapshots.build(self._sessions.values(), self._pool.differing().keys())
        if not snapshot.sessions:
            return
        copyable = await self._copyable(snapshot, token_s, now)
        memory = self.decider.policy.memory()
        try:
            decided = await self.decider.decide(snapshot.cluster, copyable, timeout_s=self._tuning.decision_s)
        except DecisionError as error:
            self.decider.record_fault(error)
            self._metrics.faults.labels(self.decider.policy.part).inc()
            return
        self._log(self.decider.policy, memory, snapshot, copyable, decided)
        for one in decided:
            session, target = snapshot.sessions[one.request], snapshot.instances[one.target]
            session.copy_after = math.inf  # one at a time
            self._spawn(self._copy(session, target, one.tokens, one.tokens * copyable.token_bytes))

    async def _copyable(self, snapshot: ClusterSnapshot, token_s: float, now: float) -> Copyable:
        cluster, instances = snapshot.cluster, snapshot.instances
        rows = len(cluster.location)
        index = {id(i): n for n, i in enumerate(instances)}
        able = cluster.movable if cluster.commanded is None else cluster.movable | cluster.commanded
        requests = np.zeros(rows, np.bool_)
        copied_to = np.full(rows, -1, np.int64)
        cached = np.zeros((rows, len(instances)), np.int64)
        self.looked_up_s, begun = 0.0, time.monotonic()
        for row, session in enumerate(snapshot.sessions):
            copied_to[row] = index.get(id(session.copied_to), -1)
            requests[row] = able[row] and now >= session.copy_after
            if requests[row] or copied_to[row] >= 0:
                cached[row] = cached_tokens(session.placement, instances)
            if (took_s := time.monotonic() - begun) > _LOOKS_UP_S:
                self.looked_up_s += took_s
                await asyncio.sleep(0)
                begun = time.monotonic()
        hellos = [i.state.hello for i in instances]
        caches = np.array([hello is not None and hello.prefix_caching for hello in hellos])
        sizes = [hello.token_bytes for hello in hellos if hello is not None]
        return Copyable(
            requests=requests,
            cached_tokens=cached,
            copied_to=copied_to,
            takes=cluster.open & caches,
            under_way=np.array([self._under_way[i] for i in instances], dtype=np.int64),
            under_way_tokens=np.array([self._under_way_tokens[i] for i in instances], dtype=np.int64),
            token_s=token_s,
            token_bytes=max(sizes, default=0.0),
            link_bytes=self._bytes,
            processes=self._processes,
        )

    async def _copy(self, session: Session, target: Instance, tokens: int, expected_bytes: float) -> None:
        """Copy what the target lacks of a request, about so many tokens, and charge it to the budgets."""
        self._bytes -= expected_bytes
        self._under_way[target] += 1
        self._under_way_tokens[target] += tokens
        moved_bytes = retry_s = 0.0
        try:
            moved_bytes = await self._bring(session, target)
        except (EngineLostError, EngineRefusedError, HandoverError, TimeoutError) as error:
            if isinstance(error, EngineLostError):
                target.health.connection_failed()
            moved_bytes, retry_s = expected_bytes, self._tuning.copy_retry_s
            self._metrics.warm_copies.labels("failed").inc()
            logger.info("no warm copy of %s on %s: %s", session.id, target.name, str(error) or repr(error))
        finally:
            session.copy_after = time.monotonic() + retry_s
            self._under_way[target] -= 1
            self._under_way_tokens[target] -= tokens
            if not self._under_way[target]:
                del self._under_way[target], self._under_way_tokens[target]  # it may be gone
            self._bytes += expected_bytes - moved_bytes

    async def _bring(self, session: Session, target: Instance) -> float:
        """Copy what the target lacks, if it still runs elsewhere and could resume there; return the bytes."""
        source, hello = session.instance, target.state.hello
        if source is None or source is target or session.unmovable_now() is not None or not target.takes("decode"):
            return 0.0
        if hello is None or why_ineligible(session.placement, target.state, source.state.settings) is not None:
            return 0.0
        copied = await precopy.copy_blocks(session, source, target, self._tuning.copy_s, background=True)
        if not copied.tokens:  # it has ended, or moves
            return 0.0
        session.copied_to = target
        cached = target.state.cached
        cached.sent(session.placement.block_hashes(cached.block_size)[: copied.tokens // cached.block_size])
        self._metrics.warm_copies.labels("copied").inc()
        self._metrics.warm_copied_tokens.inc(copied.pulled)
        self._metrics.warm_copied_bytes.inc(copied.pulled * hello.token_bytes)
        return copied.pulled * hello.token_bytes
