"""`llumnix`: the migration rule of Llumnix (Sun et al., OSDI 2024, arXiv 2406.03243), for comparison.

From the source: the freeness of an instance is F = (M - sum of virtual usages) / B, with the memory M and the batch
size B: the decode steps for which its batch can still grow. Instances with a freeness below a threshold give, those
above it take; the one with the least freeness is paired with the one with the most, and so on; of a giving instance
the request with the shortest sequence moves, one at a time. The threshold of the published code is 3 blocks of 16
tokens a request.

Reconstructed here: the virtual usage of a request is what it holds or waits for, of all that wait and not of the first
in the queue only; what is promised to moves in flight counts too. A target stays above the threshold with the request
that it takes (the "constrained" variant of the published code). Left out: priorities, which ARES does not have;
draining, which the gateway does itself; scaling; and dispatch by freeness, so that its preset has `least_loaded`.
"""

from dataclasses import dataclass

import numpy as np

from ares.policy.cluster import Cluster
from ares.policy.rebalance.base import MigrationDecision, Rebalance, register
from ares.policy.settings import in_range


@dataclass(frozen=True, slots=True)
class LlumnixSettings:
    """Settings of `llumnix`.

    Attributes
    ----------
    threshold_steps
        Freeness, in decode steps, below which an instance gives requests away and above which it takes them.
    cooldown_s
        Seconds during which a request that was moved is not moved again; Llumnix has no such time.
    """

    threshold_steps: float = 48.0
    cooldown_s: float = 0.0

    def __post_init__(self) -> None:
        in_range(self)


@register("llumnix")
class Llumnix(Rebalance):
    """Moves the shortest request of the instance with the least freeness to the one with the most."""

    Settings = LlumnixSettings
    settings: LlumnixSettings

    def decide(self, cluster: Cluster) -> list[MigrationDecision]:
        """Return a move for each pair, that of the least freeness first."""
        threshold = self.settings.threshold_steps
        batch = np.bincount(cluster.location, minlength=len(cluster.instances))
        free = cluster.capacity_tokens - cluster.load_tokens()
        freeness = free / np.maximum(batch, 1)
        order = np.argsort(freeness, kind="stable")
        sources = [int(i) for i in order if cluster.open[i] and freeness[i] < threshold]
        targets = [int(i) for i in order[::-1] if cluster.open[i] and freeness[i] > threshold]
        moves: list[MigrationDecision] = []
        for source, target in zip(sources, targets, strict=False):
            rows = np.flatnonzero(cluster.movable & (cluster.location == source))
            if not len(rows):
                continue
            row = int(rows[np.argmin(cluster.resident_tokens[rows])])
            after = float(free[target] - cluster.resident_tokens[row]) / (batch[target] + 1)
            if after <= threshold:
                continue
            reason = f"freeness {freeness[source]:.0f} steps here; {freeness[target]:.0f} there, {after:.0f} after"
            moves.append(MigrationDecision(row, source, target, float(freeness[target] - freeness[source]), reason))
        return moves
