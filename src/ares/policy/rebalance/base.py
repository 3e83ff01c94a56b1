"""What a rebalance policy is: it looks at the cluster and orders moves, each with its reason.

Both worlds ask it through `decide_moves`, so that a policy that fails or orders nonsense is found in one place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ares.policy.cluster import Cluster
from ares.policy.registry import Policy, Registry
from ares.policy.settings import check_settings_type


@dataclass(frozen=True, slots=True)
class Move:
    """One decided move: indices into the cluster it was decided on, and the numbers behind it."""

    request: int
    source: int
    target: int
    gain: float
    reason: str


@dataclass(frozen=True, slots=True)
class NoSettings:
    """Of a policy that has none."""


class Rebalance:
    """Base class of a rebalance policy; one object decides period after period, so it may remember.

    Attributes
    ----------
    name
        The name it is registered by.
    Settings
        Frozen dataclass of its settings, each with a default. A setting `cooldown_s` is the time in seconds for which
        a request that has moved is not movable; without one there is no such time.
    moves
        Whether it ever moves anything; if not, it is never asked.
    predicts
        Whether it uses predicted lengths.
    """

    name: ClassVar[str] = ""
    Settings: ClassVar[type] = NoSettings
    moves: ClassVar[bool] = True
    predicts: ClassVar[bool] = False
    settings: Any

    def __init__(self, settings: Any = None) -> None:
        self.settings = self.Settings() if settings is None else settings

    @classmethod
    def prepare(cls) -> None:
        """Do what the first decision would otherwise wait for."""

    def decide(self, cluster: Cluster) -> list[Move]:
        """Return the moves to make now, best first; no request twice."""
        raise NotImplementedError


class DecisionError(ValueError):
    """A policy failed or ordered what cannot be; `kind` is one of a few words for what is wrong."""

    def __init__(self, policy: str, kind: str, said: str) -> None:
        super().__init__(f"rebalance policy {policy!r} {said}")
        self.kind = kind


def _check(policy: type) -> None:
    if not issubclass(policy, Rebalance):
        raise TypeError(f"{policy.__name__} must be a subclass of ares.policy.rebalance.Rebalance")
    check_settings_type(policy.Settings)
    if policy.decide is Rebalance.decide:
        raise TypeError(f"{policy.__name__} must define decide(self, cluster)")


REBALANCERS: Registry[Rebalance] = Registry("rebalance", _check)


def register(name: str) -> Callable[[Policy], Policy]:
    """Register the decorated class as the rebalance policy `name`."""
    return REBALANCERS.register(name)


def rebalancer(name: str, settings: Any = None) -> Rebalance:
    """Make the policy called `name`, ready to decide.

    Raises
    ------
    ValueError
        There is none; the message lists the known names.
    DecisionError
        It cannot be made.
    """
    policy = REBALANCERS.find(name)
    try:
        policy.prepare()
        return policy(settings)
    except Exception as error:
        raise DecisionError(name, "raised", f"cannot be made: {type(error).__name__}: {error}") from error


def decide_moves(policy: Rebalance, cluster: Cluster) -> list[Move]:
    """Ask a policy for its moves.

    Raises
    ------
    DecisionError
        It raised, or what it returned is no list of moves that can be made.
    """
    try:
        moves = policy.decide(cluster)
    except Exception as error:
        raise DecisionError(policy.name, "raised", f"raised {type(error).__name__}: {error}") from error
    check_moves(policy.name, moves, cluster)
    return moves


def check_moves(policy: str, moves: object, cluster: Cluster) -> None:
    """Raise DecisionError where what a policy returned is no list of moves that can be made."""
    if not isinstance(moves, list) or not all(isinstance(move, Move) for move in moves):
        raise DecisionError(policy, "not_moves", f"must return a list of Move, not {str(moves)[:80]}")
    seen: set[int] = set()
    for move in moves:
        if wrong := _wrong(move, cluster, seen):
            raise DecisionError(policy, wrong[0], f"ordered {move}: {wrong[1]}"[:300])
        seen.add(int(move.request))


def _wrong(move: Move, cluster: Cluster, seen: set[int]) -> tuple[str, str] | None:
    """Return in a word and in full why a move cannot be made."""
    rows, count = len(cluster.location), len(cluster.instances)
    if not _index(move.request, rows):
        return "unknown_request", f"request must be an index from 0 to {rows - 1}"
    if not _index(move.target, count) or not _index(move.source, count):
        return "unknown_instance", f"source and target must be indices from 0 to {count - 1}"
    checks = (
        ("repeated", move.request in seen, "the request is ordered twice"),
        ("wrong_source", cluster.location[move.request] != move.source, "the request is not on that source"),
        ("same_instance", move.source == move.target, "it is already there"),
        ("not_movable", not cluster.movable[move.request], "the request is not movable now"),
        ("closed_target", not cluster.open[move.target], "the target takes no requests now"),
        ("gain", not _finite(move.gain), "gain must be a finite number"),
        ("reason", not isinstance(move.reason, str) or not move.reason, "it must say its reason"),
    )
    return next(((kind, said) for kind, wrong, said in checks if wrong), None)


def _index(value: object, count: int) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= int(value) < count


def _finite(value: object) -> bool:
    return isinstance(value, int | float | np.number) and bool(np.isfinite(value))
