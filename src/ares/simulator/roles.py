"""Roles that change in a simulated cluster, by the policy of the live service.

Each instance has a place among the decode instances and one among the prefill instances, and is open at one of them.
A change closes it there; what decodes there is moved away, and what waits or prefills there ends. Then the other place
is opened. Both places have the memory of the instance: KV that still waits to be pulled takes none of the other one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ares.policy import Cluster, MigrationDecision
from ares.policy.admission.state import WAITING
from ares.policy.roles import RolePool, Roles, decode_load, mean_step, plan_roles
from ares.simulator.moves import carry_out
from ares.simulator.prefill import CLOSED
from ares.simulator.state import NONE, PER_PREFILL_S, State

# Between two plans.
_PERIOD_S = 2.0
# Moves of one instance at the same time.
_MOVES = 4


@dataclass(frozen=True, slots=True)
class RoleRecord:
    """One change of role that began, and why; `decode` is how many instances decode after it."""

    time_s: float
    instance: int
    to: str
    decode: int
    reason: str


class SimulatedRoles:
    """The roles of one run.

    Parameters
    ----------
    state
        Of the cluster: as many decode as prefill instances.
    cluster
        Returns the decode pool at a time.
    policy
        Plans the roles.
    decoding
        How many instances decode at first.
    ttft_s, tpot_s
        Objectives.

    Attributes
    ----------
    records
        The changes.
    """

    def __init__(
        self,
        state: State,
        cluster: Callable[[float], Cluster],
        policy: Roles,
        decoding: int,
        ttft_s: float,
        tpot_s: float,
    ) -> None:
        self.records: list[RoleRecord] = []
        self._state, self._cluster, self._policy = state, cluster, policy
        self._ttft_s, self._tpot_s = ttft_s, tpot_s
        # By instance: whether it decodes, or is to; and whether that is still to come.
        self._decodes = np.arange(len(state.closed)) < decoding
        self._changing = np.zeros(len(state.closed), dtype=np.bool_)
        self._looks = 0
        self._busy = np.zeros(len(state.closed))
        self._planned_at = 0.0
        state.closed[~self._decodes] = 1
        state.prefill_backlog[self._decodes] += CLOSED

    def step(self, now: float) -> None:
        """Go on with the changes under way, and plan where it is time to."""
        self._looks += 1
        self._busy += self._state.prefill_current != NONE
        for instance in np.flatnonzero(self._changing).tolist():
            self._go_on(instance, now)
        if now - self._planned_at >= _PERIOD_S:
            self._plan(now)

    def _go_on(self, instance: int, now: float) -> None:
        state = self._state
        if self._decodes[instance]:
            if state.prefill_current[instance] == NONE and state.prefill_head[instance] == NONE:
                state.closed[instance] = 0
                self._changing[instance] = False
        elif self._empty(instance):
            state.prefill_backlog[instance] -= CLOSED
            self._changing[instance] = False
        else:
            self._move_away(instance, now)

    def _empty(self, instance: int) -> bool:
        state = self._state
        counts = (state.batch, state.prefilling, state.ready_count, state.arriving_count, state.inbound_count,
                  state.leaving_count)  # fmt: skip
        return state.head[instance] == NONE and not any(count[instance] for count in counts)

    def _move_away(self, instance: int, now: float) -> None:
        """Move some requests to the instances with the smallest share of their KV in use."""
        state, cluster = self._state, self._cluster(now)
        under_way = int(((state.target != NONE) & (state.decode_instance == instance)).sum())
        rows = np.flatnonzero((cluster.location == instance) & cluster.movable)
        share = np.where(cluster.open, cluster.load_tokens() / cluster.capacity_tokens, np.inf)
        moves = []
        for row in rows[: max(0, _MOVES - under_way)].tolist():
            target = int(np.argmin(share))
            share[target] += cluster.resident_tokens[row] / cluster.capacity_tokens[target]
            moves.append(MigrationDecision(row, instance, target, 0.0, "change of role"))
        carry_out(state, cluster, moves, now)

    def _plan(self, now: float) -> None:
        plan = plan_roles(self._policy, self._view(now))
        self._planned_at, self._looks = now, 0
        self._busy[:] = 0.0
        if plan.change is None:
            return
        instance, state = plan.change.instance, self._state
        self._decodes[instance] = plan.change.to == "decode"
        self._changing[instance] = True
        if self._decodes[instance]:
            state.prefill_backlog[instance] += CLOSED
        else:
            state.closed[instance] = 1
        self.records.append(RoleRecord(now, instance, plan.change.to, int(self._decodes.sum()), plan.reason))

    def _view(self, now: float) -> RolePool:
        state, cluster = self._state, self._cluster(now)
        requests, tokens = decode_load(cluster)
        waiting = np.flatnonzero(state.status == WAITING)
        backlog = state.prefill_backlog % CLOSED
        return RolePool(
            instances=tuple(f"instance-{n}" for n in range(len(state.closed))),
            decodes=self._decodes.copy(),
            able=~self._changing,
            changing=bool(self._changing.any()),
            elapsed_s=now - self._planned_at,
            busy=np.where(self._decodes, 0.0, self._busy / max(self._looks, 1)),
            queued_s=np.where(self._decodes, 0.0, backlog * state.prefill_step_model[:, PER_PREFILL_S]),
            requests=requests,
            tokens=tokens,
            capacity_tokens=cluster.capacity_tokens.astype(np.float64),
            waiting_tokens=float((state.prompt[waiting] + state.generated[waiting]).sum()),
            step_s=mean_step(cluster),
            ttft_s=self._ttft_s,
            tpot_s=self._tpot_s,
        )
