"""`current_load`: the paper's rescheduler without its predictor.

The three phases (classify, filter, simulate and select; arXiv 2510.13668) over current resident tokens only, its
"no prediction" ablation. Moving a request of n tokens from s to d changes the spread sum_i (N_i - mean)^2 by
-2 n (N_s - N_d - n), so one matrix scores every (request, target) pair at once.
"""

from dataclasses import dataclass

import numpy as np

from ares.policy.cluster import Cluster
from ares.policy.rebalance.base import MigrationDecision, Rebalance, register
from ares.policy.settings import in_range


@dataclass(frozen=True, slots=True)
class CurrentLoadSettings:
    """Settings of `current_load`.

    Attributes
    ----------
    theta
        An instance is overloaded above (1 + theta) times the mean load.
    minimum_gain
        Smallest reduction of the spread that is worth a move, as a share of the squared mean load.
    reserve
        Share of a target's KV that a move never fills, left for the growth of what runs there.
    moves_per_round
        Most moves of one decision. No instance is both source and target in the same round.
    cooldown_s
        Seconds during which a request that was moved is not moved again.
    """

    theta: float = 0.1
    minimum_gain: float = 0.01
    reserve: float = 0.1
    moves_per_round: int = 2
    cooldown_s: float = 10.0

    def __post_init__(self) -> None:
        in_range(self, reserve=1.0)


@register("current_load")
class CurrentLoad(Rebalance):
    """Evens out resident tokens: overloaded to underloaded, the move that cuts their spread most first."""

    Settings = CurrentLoadSettings
    settings: CurrentLoadSettings

    def decide(self, cluster: Cluster) -> list[MigrationDecision]:
        """Return the moves of one period."""
        settings = self.settings
        moves: list[MigrationDecision] = []
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
                MigrationDecision(
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
