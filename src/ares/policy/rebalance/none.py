"""No rebalancing."""

from ares.policy.cluster import Cluster
from ares.policy.rebalance.base import MigrationDecision, Rebalance, register


@register("none")
class NoMoves(Rebalance):
    """Never moves anything."""

    moves = False

    def decide(self, cluster: Cluster) -> list[MigrationDecision]:
        """Return no moves."""
        return []
