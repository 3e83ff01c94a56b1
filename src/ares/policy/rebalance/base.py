"""What a rebalance policy is: it looks at the cluster and orders moves, each with its reason.

The gateway and the simulator call it through `decide_moves`, so that failures and invalid moves are detected in one
place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ares.policy.base import DecisionError, Policy, is_finite, is_index, raised
from ares.policy.cluster import Cluster
from ares.policy.registry import Class, Registry


@dataclass(frozen=True, slots=True)
class MigrationDecision:
    """One decided move: indices into the cluster it was decided on, and the numbers behind it."""

    request: int
    source: int
    target: int
    gain: float
    reason: str


class Rebalance(Policy):
    """Base class of a rebalance policy; one object decides period after period.

    A setting `cooldown_s` is the time in seconds for which a request that has moved is not movable; by default it is
    movable at once.

    Attributes
    ----------
    moves
        Whether it ever moves anything; if not, it is never called.
    """

    part: ClassVar[str] = "rebalance"
    moves: ClassVar[bool] = True

    def decide(self, cluster: Cluster) -> list[MigrationDecision]:
        """Return the moves to make now, best first; no request twice."""
        raise NotImplementedError


REBALANCERS: Registry[Rebalance] = Registry(Rebalance, "decide(self, cluster)")


def register(name: str) -> Callable[[Class], Class]:
    """Register the decorated class as the rebalance policy `name`."""
    return REBALANCERS.register(name)


def rebalancer(name: str, settings: Any = None) -> Rebalance:
    """Make the policy called `name`, ready to decide; ValueError lists the known names, DecisionError: it cannot be."""
    return REBALANCERS.make(name, settings)


def decide_moves(policy: Rebalance, cluster: Cluster) -> list[MigrationDecision]:
    """Call a policy for its moves.

    Raises
    ------
    DecisionError
        It raised, or what it returned is no list of moves that can be made.
    """
    try:
        moves = policy.decide(cluster)
    except Exception as error:
        raise raised(policy, error) from error
    check_moves(policy.name, moves, cluster)
    return moves


def check_moves(policy: str, moves: object, cluster: Cluster) -> None:
    """Raise DecisionError where what a policy returned is no list of moves that can be made."""
    if not isinstance(moves, list) or not all(isinstance(move, MigrationDecision) for move in moves):
        raise DecisionError(policy, "not_moves", f"must return a list of MigrationDecision, not {str(moves)[:80]}")
    seen: set[int] = set()
    for move in moves:
        if wrong := _wrong(move, cluster, seen):
            raise DecisionError(policy, wrong[0], f"ordered {move}: {wrong[1]}"[:300])
        seen.add(int(move.request))


def _wrong(move: MigrationDecision, cluster: Cluster, seen: set[int]) -> tuple[str, str] | None:
    """Return the kind of fault and a sentence where a move cannot be made, else None."""
    rows, count = len(cluster.location), len(cluster.instances)
    if not is_index(move.request, rows):
        return "unknown_request", f"request must be an index from 0 to {rows - 1}"
    if not is_index(move.target, count) or not is_index(move.source, count):
        return "unknown_instance", f"source and target must be indices from 0 to {count - 1}"
    checks = (
        ("repeated", move.request in seen, "the request is ordered twice"),
        ("wrong_source", cluster.location[move.request] != move.source, "the request is not on that source"),
        ("same_instance", move.source == move.target, "it is already there"),
        ("not_movable", not cluster.movable[move.request], "the request is not movable now"),
        ("closed_target", not cluster.open[move.target], "the target takes no requests now"),
        ("gain", not is_finite(move.gain), "gain must be a finite number"),
        ("reason", not isinstance(move.reason, str) or not move.reason, "it needs a reason"),
    )
    return next(((kind, message) for kind, wrong, message in checks if wrong), None)
