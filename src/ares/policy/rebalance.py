"""Rebalance: which running requests change instance, and why.

`current_load` is the paper's three phases (classify, filter, simulate and select; arXiv 2510.13668) over today's
resident tokens only, its "no prediction" ablation. Moving a request of n tokens from s to d changes the spread
sum_i (N_i - mean)^2 by -2 n (N_s - N_d - n), so one matrix scores every (request, target) pair at once.
"""

from typing import Protocol

import numpy as np

from ares.policy.balance import ares, paper
from ares.policy.cluster import Cluster
from ares.policy.kernels import prepare
from ares.policy.moves import Move, RebalanceSettings


class Rebalance(Protocol):
    """Decides the moves of one period."""

    def __call__(self, cluster: Cluster, settings: RebalanceSettings) -> list[Move]:
        """Return the moves to make now, best first; no request and no reverse pair twice."""
        ...


def none(cluster: Cluster, settings: RebalanceSettings) -> list[Move]:
    """Never move anything."""
    return []


def current_load(cluster: Cluster, settings: RebalanceSettings) -> list[Move]:
    """Even out resident tokens: overloaded to underloaded, the move that cuts their spread most first."""
    moves: list[Move] = []
    load = cluster.load_tokens().astype(np.float64)
    if not cluster.open.any() or not len(cluster.requests):
        return moves
    mean = float(load[cluster.open].mean())
    room = cluster.capacity_tokens * (1.0 - settings.reserve) - load
    size = cluster.resident_tokens.astype(np.float64)
    movable = cluster.movable.copy()
    sources: set[int] = set()
    targets: set[int] = set()

    for _ in range(settings.moves_per_round):
        over = load > (1.0 + settings.theta) * mean
        under = cluster.open & (load < mean)
        over[list(targets)] = False
        under[list(sources)] = False
        requests = np.flatnonzero(movable & over[cluster.location])
        instances = np.flatnonzero(under)
        if not len(requests) or not len(instances):
            break
        n = size[requests][:, None]
        gap = load[cluster.location[requests]][:, None] - load[instances][None, :]
        gain = np.where(n <= room[instances][None, :], 2.0 * n * (gap - n), -np.inf)
        row, column = np.unravel_index(int(np.argmax(gain)), gain.shape)
        best = float(gain[row, column])
        if best <= settings.minimum_gain * mean * mean:
            break
        request, target = int(requests[row]), int(instances[column])
        source = int(cluster.location[request])
        moved = size[request]
        moves.append(
            Move(
                request=request,
                source=source,
                target=target,
                gain=best,
                reason=(
                    f"load {load[source]:.0f} against mean {mean:.0f}; {moved:.0f} tokens leave "
                    f"{load[source] - moved:.0f} here and {load[target] + moved:.0f} there"
                ),
            )
        )
        load[source] -= moved
        load[target] += moved
        room[target] -= moved
        movable[request] = False
        sources.add(source)
        targets.add(target)
    return moves


REBALANCERS: dict[str, Rebalance] = {
    "none": none,
    "current_load": current_load,
    "paper": paper,
    "ares": ares,
    # The same rule; the simulator gives it true lengths.
    "oracle": ares,
}


def rebalancer(name: str) -> Rebalance:
    """Return the rebalancer called `name`, ready to decide; ValueError lists the known names."""
    if name not in REBALANCERS:
        raise ValueError(f"unknown rebalance {name!r}; known: {', '.join(sorted(REBALANCERS))}")
    if name not in ("none", "current_load"):
        prepare()
    return REBALANCERS[name]
