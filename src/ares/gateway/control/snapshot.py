"""The decode pool as the policy sees it: telemetry, predictions and the gateway's own sessions in arrays."""

import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ares.gateway.control.cost_models import TransferModel
from ares.gateway.control.instance_loads import InstanceLoads, in_blocks
from ares.gateway.control.lengths import LengthHistory
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import Pool
from ares.gateway.processes.shared_counts import Placed, SharedCounts
from ares.gateway.records.metrics import Metrics
from ares.gateway.session.objectives import ORDINARY
from ares.gateway.session.phase import Phase
from ares.gateway.session.session import Session
from ares.policy import Cluster
from ares.policy.admission import Candidates, Progress
from ares.policy.cluster import BoolArray
from ares.policy.cost_model import default_tpot_s
from ares.policy.kv_layout import KvLayout
from ares.predicted_load import plausible
from ares.protocol import messages

Quantiles = tuple[float, float, float]
# Objective of a request without one of its own, until the steps are known.
_TPOT_BEFORE_FIT_S = 1.0
# Stall of a move, until one has been measured.
_STALL_BEFORE_FIT_S = 0.1


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """The policy's cluster at one moment, and the instances and sessions of its indices.

    Rows after those of `sessions` are requests of other gateways, which cannot be moved from here.
    """

    cluster: Cluster
    running: Progress
    instances: list[Instance]
    sessions: list[Session]
    preempted: list[Session]
    """Those that their instance has preempted: they wait in its own queue, without KV."""


class SnapshotBuilder:
    """Makes snapshots.

    Parameters
    ----------
    pool
        The instances.
    metrics
        Counts implausible predictions.
    gateway
        The gateway's name, with which its keys begin.
    counts
        Those that the processes of the gateway share: the others' requests count before the instances report them.

    Attributes
    ----------
    transfer_time, lengths
        Fitted to the moves and the outputs of this gateway.
    instance_loads
        Told of each session that dispatch sends to an instance.
    cooldown_s
        For so long after a move a session is not movable.
    """

    def __init__(self, pool: Pool, metrics: Metrics, gateway: str, counts: SharedCounts | None = None) -> None:
        self.transfer_time = TransferModel()
        self.lengths = LengthHistory()
        self.instance_loads = InstanceLoads()
        self.cooldown_s = 0.0
        self._pool = pool
        self._metrics = metrics
        self._gateway = gateway
        self._counts = counts or SharedCounts()

    def build(self, sessions: Iterable[Session], exclude: Collection[str] = ()) -> ClusterSnapshot:
        """Return the decode pool now, with instances named in `exclude` closed."""
        now = time.monotonic()
        instances = self._pool.decode_instances
        block = max((i.state.hello.block_size for i in instances if i.state.hello is not None), default=1)
        index = {id(i): n for n, i in enumerate(instances)}
        rows: list[dict[str, messages.Row]] = [
            {r.key: r for r in i.state.telemetry.rows} if i.state.telemetry else {} for i in instances
        ]
        promised = np.zeros(len(instances), dtype=np.int64)
        shown: list[Session] = []
        preempted: list[Session] = []
        restored = self._pool.restored_by_all
        differing = self._pool.differing()
        shortest = min((i.state.hello.max_model_len for i in instances if i.state.hello is not None), default=0)
        location, resident, movable, commanded, remaining = [], [], [], [], []
        for session in sessions:
            if session.incoming is not None and (target := index.get(id(session.incoming))) is not None:
                promised[target] += in_blocks(instances[target].state.layout.kv_tokens(session.tokens), block)
            where = index.get(id(session.instance or session.destination))
            if where is None:
                continue
            row = rows[where].pop(session.key or "", None)
            shown.append(session)
            location.append(where)
            left = self.remaining(session, row)
            # A request in the instance's queue, preempted or not, gets its memory before any that comes later.
            held = row.resident if row is not None and row.resident else session.tokens
            resident.append(instances[where].state.layout.kv_tokens(held, int(left[-1])))
            if row is not None and row.state == "waiting" and row.output:
                preempted.append(session)
            cooled = not session.moved_at or now - session.moved_at > self.cooldown_s
            anywhere = (
                session.sampling.needs <= restored
                and self._pool.all_serve(session.sampling.adapter)
                and instances[where].name not in differing
                and len(session.prompt) + session.sampling.maximum_tokens <= shortest
            )
            can_move = cooled and anywhere and session.unmovable_now() is None
            stays = now < session.commanded_until
            movable.append(can_move and not stays)
            commanded.append(can_move and stays)
            remaining.append(left)
        others: list[messages.Row] = []
        reported: Counter[tuple[int, str]] = Counter()
        for n, unknown in enumerate(rows):
            kv_tokens = instances[n].state.layout.kv_tokens
            for row in unknown.values():
                if messages.owner(row.key) == self._gateway:  # ours: it is prefilled there, or was there before
                    promised[n] += in_blocks(kv_tokens(row.resident), block)
                elif row.resident > 0:
                    others.append(row)
                    reported[n, messages.owner(row.key)] += in_blocks(kv_tokens(row.resident), block)
                    location.append(n)
                    resident.append(kv_tokens(row.resident, int(self._remaining_elsewhere(row)[-1])))
        for n, placed in self._placed_by_others(instances):
            # What a process has placed, and the instance does not report yet.
            promised[n] += max(0, placed.tokens - reported[n, placed.gateway]) + placed.growth
        movable += [False] * len(others)
        commanded += [False] * len(others)
        remaining += [self._remaining_elsewhere(row) for row in others]
        fitted = [i.state.step_time.coefficients for i in instances]
        known = [one for one in fitted if one is not None]
        # An instance that has not worked yet counts as the mean of the others.
        step_time = np.array([np.mean(known, axis=0) if one is None else one for one in fitted]) if known else None
        cluster = Cluster(
            instances=tuple(i.name for i in instances),
            capacity_tokens=np.array([i.state.capacity_tokens for i in instances], dtype=np.int64),
            promised_tokens=promised,
            open=_open(instances, exclude),
            requests=(*(s.id for s in shown), *(row.key for row in others)),
            location=np.array(location, dtype=np.int64),
            resident_tokens=np.array(resident, dtype=np.int64),
            movable=np.array(movable, dtype=np.bool_),
            remaining_tokens=np.array(remaining, dtype=np.float64).reshape(-1, len(messages.REMAINING_LEVELS)),
            levels=messages.REMAINING_LEVELS,
            step_base_s=step_time[:, 0].copy() if step_time is not None else None,
            step_request_s=step_time[:, 1].copy() if step_time is not None else None,
            step_token_s=step_time[:, 2].copy() if step_time is not None else None,
            transfer_bytes_s=self.transfer_time.tokens_per_s or 1e6,
            token_bytes=1.0,  # transfers are counted in tokens
            block_tokens=block,
            commanded=np.array(commanded, dtype=np.bool_) if any(commanded) else None,
            stall_s=_STALL_BEFORE_FIT_S if self.transfer_time.pause_s is None else self.transfer_time.pause_s,
        )
        running = self._progress(shown, cluster, now, others)
        return ClusterSnapshot(cluster, running, instances, shown, preempted)

    def build_loads(self, sessions: Iterable[Session], exclude: Collection[str] = ()) -> ClusterSnapshot:
        """Return the decode pool without its requests, for dispatch."""
        instances = self._pool.decode_instances
        block = max((i.state.hello.block_size for i in instances if i.state.hello is not None), default=1)
        others = [0] * len(instances)
        for n, placed in self._placed_by_others(instances):
            others[n] += placed.tokens
        tokens = self.instance_loads.read(instances, sessions, block, others)
        none = np.zeros(0, dtype=np.int64)
        cluster = Cluster(
            instances=tuple(i.name for i in instances),
            capacity_tokens=np.array([i.state.capacity_tokens for i in instances], dtype=np.int64),
            promised_tokens=np.array(tokens, dtype=np.int64),
            open=_open(instances, exclude),
            requests=(),
            location=none,
            resident_tokens=none,
            movable=none.astype(np.bool_),
        )
        return ClusterSnapshot(cluster, self._progress([], cluster, 0.0), instances, [], [])

    def publish(self, sessions: Iterable[Session]) -> None:
        """Tell the other processes of the gateway what this one has on each instance."""
        # Those with nothing as well: other processes look for them.
        placed = {instance.url: (0, 0) for instance in self._pool.decode_instances}
        keys = {
            id(i): {row.key for row in i.state.telemetry.rows}
            for i in self._pool.decode_instances
            if i.state.telemetry is not None
        }
        for session in sessions:
            for where in (session.incoming, session.instance or session.destination):
                if where is not None:
                    known = session.key in keys.get(id(where), ())
                    growth = 0 if known else round(self.median_remaining(session))
                    before = placed.get(where.url, (0, 0))
                    placed[where.url] = before[0] + _room(session, where), before[1] + growth
        self._counts.set_placed(placed)

    def publish_placed(self, session: Session, instance: Instance) -> None:
        """Tell the other processes of a session that is placed on an instance now."""
        if self._counts.processes > 1:
            growth = round(self.median_remaining(session))
            self._counts.add_placed(instance.url, _room(session, instance), growth)

    def _placed_by_others(self, instances: list[Instance]) -> Iterator[tuple[int, Placed]]:
        if self._counts.processes > 1:
            for n, instance in enumerate(instances):
                for placed in self._counts.placed_by_others(instance.url):
                    yield n, placed

    def candidates(self, sessions: list[Session], cluster: Cluster, excludes: list[set[str]]) -> Candidates:
        """Return sessions outside decode as candidates; `excludes` names the instances that may not take each."""
        now = time.monotonic()
        remaining = [self.remaining(s, None) for s in sessions]
        # Where the instances differ, a candidate counts with the most that it would take on one of them.
        layouts = {i.state.layout for i in self._pool.decode_instances} or {KvLayout(1)}
        kv_tokens = [
            max(layout.kv_tokens(s.tokens, int(left[-1])) for layout in layouts)
            for s, left in zip(sessions, remaining, strict=True)
        ]
        return Candidates(
            requests=tuple(s.id for s in sessions),
            tokens=np.array(kv_tokens, dtype=np.int64),
            remaining_tokens=np.array(remaining).reshape(len(sessions), 3),
            rank=np.array([s.objective.rank for s in sessions], dtype=np.int64),
            waited_s=np.array(
                [now - (s.waiting_since if s.phase is Phase.SUSPENDED else s.arrived_at) for s in sessions]
            ),
            suspended=np.array([s.phase is Phase.SUSPENDED for s in sessions], dtype=np.bool_),
            progress=self._progress(sessions, cluster, now),
            excluded=np.array([[i in names for i in cluster.instances] for names in excludes])
            if any(excludes)
            else None,
        )

    def remaining(self, session: Session, row: messages.Row | None) -> Quantiles:
        """Return quantiles of what a session will still generate: predicted, or estimated from recent outputs."""
        limit = float(max(1, session.sampling.maximum_tokens - len(session.emitted)))
        predicted = row.remaining if row is not None else None
        since = session.tokens - row.resident if row is not None and row.resident else 0
        if predicted is None and session.predicted is not None:
            predicted, since = session.predicted[0], session.tokens - session.predicted[1]
        if predicted is not None:
            if plausible(predicted):
                session.predicted = (predicted, session.tokens - since)
                low, middle, high = (min(max(q - since, 1.0), limit) for q in predicted)
                return low, middle, high
            self._metrics.implausible.inc()
        low, middle, high = self.lengths.remaining(len(session.emitted), session.length_features)
        # Written out: a generator would take as long as the estimate.
        return min(max(low, 1.0), limit), min(max(middle, 1.0), limit), min(max(high, 1.0), limit)

    def median_remaining(self, session: Session) -> float:
        """Return the median of what a session that no instance reports will still generate."""
        return self.remaining(session, None)[1]

    def _remaining_elsewhere(self, row: messages.Row) -> Quantiles:
        """Return quantiles of what a request of another gateway will still generate."""
        if row.remaining is not None and plausible(row.remaining):
            return row.remaining
        return self.lengths.remaining(row.output)

    def _progress(
        self, sessions: list[Session], cluster: Cluster, now: float, others: Collection[messages.Row] = ()
    ) -> Progress:
        """Return the progress of sessions, followed by requests of other gateways, never suspended from here."""
        usual_tpot_s = _TPOT_BEFORE_FIT_S
        if cluster.step_base_s is not None and cluster.step_token_s is not None:
            capacity = cluster.capacity_tokens.astype(np.float64)
            usual_tpot_s = float(default_tpot_s(cluster.step_base_s, cluster.step_token_s, capacity).max())
        other_count = len(others)
        nan = float("nan")
        return Progress(
            generated=np.array([len(s.emitted) for s in sessions] + [row.output for row in others], dtype=np.int64),
            age_s=np.array([now - s.arrived_at for s in sessions] + [0.0] * other_count),
            elapsed_s=np.array(
                [now - s.output.first_token_at if s.output.first_token_at else nan for s in sessions]
                + [nan] * other_count
            ),
            ttft_s=np.array([s.objective.ttft_s for s in sessions] + [ORDINARY.ttft_s] * other_count),
            tpot_s=np.array(
                [usual_tpot_s if s.objective.tpot_s is None else s.objective.tpot_s for s in sessions]
                + [usual_tpot_s] * other_count
            ),
            gap_s=np.array([s.objective.gap_s for s in sessions] + [np.inf] * other_count),
            longest_gap_s=np.array([s.output.longest_gap_s for s in sessions] + [0.0] * other_count),
            rank=np.array([s.objective.rank for s in sessions] + [0] * other_count, dtype=np.int64),
        )


def _room(session: Session, instance: Instance) -> int:
    """Return the tokens of KV that a session takes on an instance now, in whole blocks."""
    block = instance.state.hello.block_size if instance.state.hello is not None else 1
    return in_blocks(instance.state.layout.kv_tokens(session.tokens), block)


def accepting(instances: list[Instance], exclude: Collection[str]) -> list[Instance]:
    """Return the instances that take work in decode.

    Without any telemetry, an instance that answers at all is better than none (I7).
    """
    usable = [i for i in instances if i.name not in exclude] if exclude else instances
    reachable = (i for i in usable if i.does("decode") and not i.closing and i.health.reachable)
    return [i for i in usable if i.takes("decode")] or list(reachable)


def _open(instances: list[Instance], exclude: Collection[str]) -> BoolArray:
    """Return which instances take work, shape (I,)."""
    found = {id(i) for i in accepting(instances, exclude)}
    return np.array([id(i) in found for i in instances], dtype=np.bool_)
