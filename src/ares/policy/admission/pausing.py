"""`pausing`: requests of an overloaded instance are paused and run again later, instead of moved; for comparison.

From the source (DyntraLB, vllm-ascend pull request 12292, `_balance_load`): nothing changes its instance. Each
instance first takes its waiting requests in their order. While the largest load exceeds the mean by a threshold (in
blocks, or as a share of the largest), the least loaded instance exchanges a running request for a larger one that waits
there, the most loaded one for a smaller one, in each case the pair that brings it nearest to the mean; where neither
can, the most loaded instance pauses the request whose absence lets the cluster compute most tokens a second, if that is
more than now. What is paused waits with the others of its instance and is considered again each time.

Reconstructed here: to pause is to suspend, as the gateway can: the KV goes, and is computed again before the request
runs again, where the source keeps it in memory. So loads are resident tokens, and an instance takes waiting requests
while their tokens fit instead of up to a batch size. An arriving request is assigned to the least loaded instance, and
a paused one stays assigned to its own while that is open. The instances of the source wait for each other in
every step, and the tokens a second are estimated as if ours did. It decides when something changes, not at every step.
"""

from dataclasses import dataclass, field

import numpy as np

from ares.policy.admission.base import Admission, AdmissionDecision, Candidates, Progress, register
from ares.policy.cluster import BoolArray, Cluster, IntArray
from ares.policy.settings import in_range


@dataclass(frozen=True, slots=True)
class PausingSettings:
    """Settings of `pausing`.

    Attributes
    ----------
    threshold
        Excess of the largest load over the mean, as a share of the largest, below which nothing is changed.
    rounds
        Exchanges and pauses that one decision makes at most.
    """

    threshold: float = 0.2
    rounds: int = 50

    def __post_init__(self) -> None:
        in_range(self, threshold=1.0, rounds=1000.0)


@dataclass(slots=True)
class _Request:
    """A row of the cluster, or a candidate."""

    index: int
    tokens: int
    ran: bool
    movable: bool


@dataclass(slots=True)
class _InstancePlan:
    """What is to run and to wait at one instance."""

    load: int
    room: int
    running: list[_Request] = field(default_factory=list)
    waiting: list[_Request] = field(default_factory=list)

    def start(self, one: _Request) -> None:
        self.waiting.remove(one)
        self.running.append(one)
        self.load += one.tokens

    def stop(self, one: _Request) -> None:
        self.running.remove(one)
        self.waiting.append(one)
        self.load -= one.tokens


@register("pausing")
class Pausing(Admission):
    """Pauses and resumes; nothing is moved."""

    Settings = PausingSettings
    settings: PausingSettings
    quick = True
    watches = True

    def __init__(self, settings: PausingSettings | None = None) -> None:
        super().__init__(settings)
        self._home: dict[object, str] = {}

    def decide(self, cluster: Cluster, candidates: Candidates, running: Progress) -> list[AdmissionDecision]:
        """Return the decisions that turn what runs into the plan."""
        plans = self._plans(cluster, candidates)
        opened = [plans[i] for i in np.flatnonzero(cluster.open)]
        for plan in opened:
            while plan.waiting and (not plan.running or plan.load + plan.waiting[0].tokens <= plan.room):
                plan.start(plan.waiting[0])
        for _ in range(self.settings.rounds):
            if not opened or _excess_share(opened) <= self.settings.threshold:
                break
            least, most = min(opened, key=lambda c: c.load), max(opened, key=lambda c: c.load)
            changed = _exchange(least, opened, 1) | _exchange(most, opened, -1)
            if not changed and not _drop(most, opened, cluster):
                break
        out: list[AdmissionDecision] = []
        back: list[AdmissionDecision] = []
        for instance, plan in enumerate(plans):
            name = cluster.instances[instance]
            for one in (one for one in plan.waiting if one.ran):
                reason = f"paused: {plan.load} tokens are left here, {_mean(opened):.0f} in the mean"
                out.append(AdmissionDecision("suspend", one.index, instance, reason))
                self._home[cluster.requests[one.index]] = name
            for one in (one for one in plan.running if not one.ran):
                kind = "resume" if candidates.suspended[one.index] else "admit"
                reason = f"{plan.load} tokens here with it, {_mean(opened):.0f} in the mean"
                back.append(AdmissionDecision(kind, one.index, instance, reason))  # type: ignore[arg-type]
        return out + back

    def _plans(self, cluster: Cluster, candidates: Candidates) -> list[_InstancePlan]:
        """Return what runs and what waits at each instance; each waiting request is assigned to one."""
        plans = [_InstancePlan(int(load), int(room)) for load, room in zip(
            cluster.load_tokens(), cluster.capacity_tokens, strict=True)]  # fmt: skip
        for row, (where, tokens) in enumerate(zip(cluster.location, cluster.resident_tokens, strict=True)):
            plans[where].running.append(_Request(row, int(tokens), True, bool(cluster.movable[row])))
        places = {name: n for n, name in enumerate(cluster.instances)}
        expected = cluster.load_tokens()
        homes: dict[object, str] = {}
        for index in np.argsort(-candidates.waited_s, kind="stable").tolist():
            tokens = int(candidates.tokens[index])
            allowed = cluster.open if candidates.excluded is None else cluster.open & ~candidates.excluded[index]
            request = candidates.requests[index]
            home = places.get(self._home.get(request, ""), -1)
            if home < 0 or not allowed[home]:
                home = _least_loaded(expected, cluster.capacity_tokens, allowed)
            if home >= 0:
                homes[request] = cluster.instances[home]
                expected[home] += tokens
                plans[home].waiting.append(_Request(index, tokens, False, True))
        running = set(cluster.requests)  # a request that is being paused runs until its instance has released it
        self._home = {request: home for request, home in self._home.items() if request in running} | homes
        return plans


def _least_loaded(load: IntArray, capacity: IntArray, allowed: BoolArray) -> int:
    if not allowed.any():
        return -1
    share = np.where(allowed, load / np.maximum(capacity, 1), np.inf)
    return int(np.argmin(share))


def _mean(plans: list[_InstancePlan]) -> float:
    return sum(plan.load for plan in plans) / max(len(plans), 1)


def _excess_share(plans: list[_InstancePlan]) -> float:
    """Return by how much the largest load exceeds the mean, as a share of the largest."""
    most = max(plan.load for plan in plans)
    return (most - _mean(plans)) / most if most > 0 else 0.0


def _exchange(plan: _InstancePlan, plans: list[_InstancePlan], sign: int) -> bool:
    """Exchange a running request for a larger (sign 1) or smaller (-1) one, if that brings the mean nearer."""
    mean, count = _mean(plans), len(plans)
    best: tuple[_Request, _Request] | None = None
    nearest = abs(plan.load - mean)
    for runs in (one for one in plan.running if one.movable):
        for waits in plan.waiting:
            more = waits.tokens - runs.tokens
            distance = abs(plan.load + more - (mean + more / count))
            if more * sign > 0 and distance < nearest and plan.load + more <= plan.room:
                nearest, best = distance, (runs, waits)
    if best is None:
        return False
    plan.stop(best[0])
    plan.start(best[1])
    return True


def _drop(plan: _InstancePlan, plans: list[_InstancePlan], cluster: Cluster) -> bool:
    """Pause the request without which the cluster computes most tokens a second, if that is more than with it."""
    total = sum(len(one.running) for one in plans)
    if total <= 1 or cluster.step_base_s is None or cluster.step_token_s is None:
        return False
    base, token = float(cluster.step_base_s.mean()), float(cluster.step_token_s.mean())
    second = max((one.load for one in plans if one is not plan), default=0)
    best: _Request | None = None
    rate = total / (base + token * plan.load)
    for one in (one for one in plan.running if one.movable):
        without = (total - 1) / (base + token * max(plan.load - one.tokens, second))
        if without > rate:
            rate, best = without, one
    if best is None:
        return False
    plan.stop(best)
    return True
