"""The decode pool as the policy sees it: telemetry, predictions and the gateway's own sequences in arrays."""

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from ares.gateway.control.cost_models import TransferModel
from ares.gateway.control.lengths import LengthHistory
from ares.gateway.control.predictions import plausible
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import Pool
from ares.gateway.records.metrics import Metrics
from ares.gateway.session.objectives import ORDINARY
from ares.gateway.session.placement import Entering
from ares.gateway.session.session import Session
from ares.policy import Cluster
from ares.policy.admission import Candidates, Progress
from ares.policy.cluster import BoolArray
from ares.protocol import messages

Quantiles = tuple[float, float, float]
_NOWHERE = -1
# Without an objective of its own, a request is to get its tokens in one and a half times a step at full memory.
_RELATIVE_TPOT = 1.5
_UNKNOWN_TPOT_S = 1.0
# For how long a move stops a stream, until one has been measured.
_UNKNOWN_STALL_S = 0.1


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """One moment: the policy's cluster, and what its indices stand for.

    Rows behind those of `sequences` are requests of other gateways, which nobody can move from here.
    """

    cluster: Cluster
    running: Progress
    instances: list[Instance]
    sequences: list[Session]
    preempted: list[Session]
    """Those whose KV an instance has thrown away: they wait in its own queue."""


class SnapshotBuilder:
    """Makes views.

    Parameters
    ----------
    pool
        The instances.
    metrics
        Counts predictions that make no sense.
    gateway
        The gateway's name, with which its keys begin.
    """

    def __init__(self, pool: Pool, metrics: Metrics, gateway: str) -> None:
        self.transfer = TransferModel()
        self.lengths = LengthHistory()
        self._pool = pool
        self._metrics = metrics
        # A sequence that has moved is not movable for this long.
        self.cooldown_s = 0.0
        self._gateway = gateway

    def view(self, sequences: Iterable[Session], exclude: Collection[str] = ()) -> ClusterSnapshot:
        """Return the decode pool now; instances named in `exclude` are shown closed."""
        now = time.monotonic()
        instances = list(self._pool.decode())
        block = max((i.state.hello.block_size for i in instances if i.state.hello is not None), default=1)
        index = {id(i): n for n, i in enumerate(instances)}
        rows: list[dict[str, messages.Row]] = [
            {r.key: r for r in i.state.telemetry.rows} if i.state.telemetry else {} for i in instances
        ]
        promised = np.zeros(len(instances), dtype=np.int64)
        shown: list[Session] = []
        preempted: list[Session] = []
        carried = self._pool.carried
        location, resident, movable, placed, remaining = [], [], [], [], []
        for sequence in sequences:
            if sequence.incoming is not None and (target := index.get(id(sequence.incoming))) is not None:
                promised[target] += in_blocks(sequence.tokens, block)
            where = index.get(id(sequence.instance or sequence.destination))
            if where is None:
                continue
            row = rows[where].pop(sequence.key or "", None)
            shown.append(sequence)
            location.append(where)
            # What waits there, preempted or not, takes its memory before anything that comes later.
            resident.append(row.resident if row is not None and row.resident else sequence.tokens)
            if row is not None and row.state == "waiting" and row.output:
                preempted.append(sequence)
            cool = not sequence.moved_at or now - sequence.moved_at > self.cooldown_s
            able = cool and sequence.sampling.needs <= carried and sequence.not_movable() is None
            rests = now < sequence.rests_until
            movable.append(able and not rests)
            placed.append(able and rests)
            remaining.append(self.remaining(sequence, row))
        others: list[messages.Row] = []
        for n, left in enumerate(rows):
            for row in left.values():
                if messages.owner(row.key) == self._gateway:  # one of ours that is prefilled there, or was there before
                    promised[n] += in_blocks(row.resident, block)
                elif row.resident > 0:
                    others.append(row)
                    location.append(n)
                    resident.append(row.resident)
        movable += [False] * len(others)
        placed += [False] * len(others)
        remaining += [self._foreseen(row) for row in others]
        laws = [i.state.step_time.law for i in instances]
        known = [law for law in laws if law is not None]
        # An instance that has not worked yet is taken to be like the others.
        law = np.array([one if one is not None else np.mean(known, axis=0) for one in laws]) if known else None
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
            step_base_s=law[:, 0].copy() if law is not None else None,
            step_request_s=law[:, 1].copy() if law is not None else None,
            step_token_s=law[:, 2].copy() if law is not None else None,
            transfer_bytes_s=self.transfer.tokens_s or 1e6,
            token_bytes=1.0,  # transfers are counted in tokens
            block_tokens=block,
            placed=np.array(placed, dtype=np.bool_) if any(placed) else None,
            stall_s=_UNKNOWN_STALL_S if self.transfer.pause_s is None else self.transfer.pause_s,
        )
        running = self._progress(shown, cluster, now, others)
        return ClusterSnapshot(cluster, running, instances, shown, preempted)

    def loads(self, sequences: Iterable[Session], exclude: Collection[str] = ()) -> ClusterSnapshot:
        """Return the decode pool without its requests: what dispatch asks at every arrival must not look at them all.

        The load of an instance is that of our own sequences in whole KV blocks, for these are what runs out, or what it
        reports where others use it too.
        """
        instances = list(self._pool.decode())
        block = max((i.state.hello.block_size for i in instances if i.state.hello is not None), default=1)
        tokens = dict.fromkeys(map(id, instances), 0)
        for sequence in sequences:
            where = id(sequence.instance or sequence.destination)
            if where in tokens:
                tokens[where] += in_blocks(sequence.tokens, block)
        reported = [
            sum(in_blocks(row.resident, block) for row in i.state.telemetry.rows) if i.state.telemetry else 0
            for i in instances
        ]
        none = np.zeros(0, dtype=np.int64)
        cluster = Cluster(
            instances=tuple(i.name for i in instances),
            capacity_tokens=np.array([i.state.capacity_tokens for i in instances], dtype=np.int64),
            promised_tokens=np.maximum(np.array(list(tokens.values()), dtype=np.int64), reported),
            open=_open(instances, exclude),
            requests=(),
            location=none,
            resident_tokens=none,
            movable=none.astype(np.bool_),
        )
        return ClusterSnapshot(cluster, self._progress([], cluster, 0.0), instances, [], [])

    def candidates(self, shown: list[Session], cluster: Cluster, excludes: list[set[str]]) -> Candidates:
        """Return sequences outside decode as the policy sees them, and where each does not go, by name."""
        now = time.monotonic()
        return Candidates(
            requests=tuple(s.id for s in shown),
            tokens=np.array([s.tokens for s in shown], dtype=np.int64),
            remaining_tokens=np.array([self.remaining(s, None) for s in shown]).reshape(len(shown), 3),
            rank=np.array([s.objective.rank for s in shown], dtype=np.int64),
            waited_s=np.array([now - (s.waiting_since if s.phase == "suspended" else s.arrived_at) for s in shown]),
            suspended=np.array([s.phase == "suspended" for s in shown], dtype=np.bool_),
            progress=self._progress(shown, cluster, now),
            barred=np.array([[i in names for i in cluster.instances] for names in excludes]) if any(excludes) else None,
        )

    def remaining(self, sequence: Entering, row: messages.Row | None) -> Quantiles:
        """Return quantiles of what a sequence will still generate: predicted, or as outputs went lately."""
        limit = float(max(1, sequence.sampling.maximum_tokens - len(sequence.emitted)))
        predicted = row.remaining if row is not None else None
        since = sequence.tokens - row.resident if row is not None and row.resident else 0
        if predicted is None and sequence.predicted is not None:
            predicted, since = sequence.predicted[0], sequence.tokens - sequence.predicted[1]
        if predicted is not None:
            if plausible(predicted):
                sequence.predicted = (predicted, sequence.tokens - since)
                low, middle, high = (min(max(q - since, 1.0), limit) for q in predicted)
                return low, middle, high
            self._metrics.implausible.inc()
        low, middle, high = (min(max(q, 1.0), limit) for q in self.lengths.remaining(len(sequence.emitted)))
        return low, middle, high

    def _foreseen(self, row: messages.Row) -> Quantiles:
        """Return quantiles of what a request of another gateway will still generate."""
        if row.remaining is not None and plausible(row.remaining):
            return row.remaining
        return self.lengths.remaining(row.output)

    def _progress(
        self, sequences: list[Session], cluster: Cluster, now: float, others: Collection[messages.Row] = ()
    ) -> Progress:
        """Tell how sequences stand, and behind them the requests of other gateways, which nobody suspends from here."""
        usual = _UNKNOWN_TPOT_S
        if cluster.step_base_s is not None and cluster.step_token_s is not None:
            full = cluster.step_base_s + cluster.step_token_s * cluster.capacity_tokens
            usual = _RELATIVE_TPOT * float(full.max())
        behind = len(others)
        nan = float("nan")
        return Progress(
            generated=np.array([len(s.emitted) for s in sequences] + [row.output for row in others], dtype=np.int64),
            age_s=np.array([now - s.arrived_at for s in sequences] + [0.0] * behind),
            elapsed_s=np.array(
                [now - s.first_token_at if s.first_token_at else nan for s in sequences] + [nan] * behind
            ),
            ttft_s=np.array([s.objective.ttft_s for s in sequences] + [ORDINARY.ttft_s] * behind),
            tpot_s=np.array(
                [usual if s.objective.tpot_s is None else s.objective.tpot_s for s in sequences] + [usual] * behind
            ),
            gap_s=np.array([s.objective.gap_s for s in sequences] + [np.inf] * behind),
            longest_gap_s=np.array([s.longest_gap_s for s in sequences] + [0.0] * behind),
            rank=np.array([s.objective.rank for s in sequences] + [0] * behind, dtype=np.int64),
        )


def in_blocks(tokens: int, block: int) -> int:
    """Return the tokens of the KV blocks that a sequence of so many holds, the next one included."""
    return -(-(tokens + 1) // block) * block if tokens else 0


def taking(instances: list[Instance], exclude: Collection[str]) -> list[Instance]:
    """Return the instances that take work.

    Where nobody's telemetry comes, whoever answers at all is better than nobody (I7).
    """
    usable = [i for i in instances if not i.state.draining and i.name not in exclude]
    return [i for i in usable if i.open] or [i for i in usable if i.health.reachable]


def _open(instances: list[Instance], exclude: Collection[str]) -> BoolArray:
    """Tell which instances take work, shape (I,)."""
    found = {id(i) for i in taking(instances, exclude)}
    return np.array([id(i) in found for i in instances], dtype=np.bool_)
