"""One check, for both worlds, of what a policy orders."""

from dataclasses import replace

import numpy as np
import pytest

from ares.policy import Cluster, DecisionError, MigrationDecision, Rebalance, decide_moves
from tests.policy.test_rebalance import cluster

VIEW = replace(
    cluster([0, 0, 1], [500, 600, 700], None, [1000] * 3),
    open=np.array([True, True, False]),
    movable=np.array([True, True, False]),
)
GOOD = MigrationDecision(request=0, source=0, target=1, gain=1.0, reason="x")


class Given(Rebalance):
    name = "given"

    def decide(self, cluster: Cluster) -> list[MigrationDecision]:
        if isinstance(self.settings, Exception):
            raise self.settings
        moves: list[MigrationDecision] = self.settings
        return moves


def test_good_moves_go_through() -> None:
    moves = [GOOD, replace(GOOD, request=np.int64(1), gain=np.float64(2.0))]
    assert decide_moves(Given(moves), VIEW) == moves
    assert decide_moves(Given([]), VIEW) == []


@pytest.mark.parametrize(
    ("moves", "kind"),
    [
        (RuntimeError("a bug"), "raised"),
        ((GOOD,), "not_moves"),
        ("moves", "not_moves"),
        ([GOOD, (0, 0, 1)], "not_moves"),
        ([replace(GOOD, request=3)], "unknown_request"),
        ([replace(GOOD, request=-1)], "unknown_request"),
        ([replace(GOOD, request="r0")], "unknown_request"),
        ([replace(GOOD, target=3)], "unknown_instance"),
        ([replace(GOOD, target=0.0)], "unknown_instance"),
        ([GOOD, GOOD], "repeated"),
        ([replace(GOOD, source=1, target=0)], "wrong_source"),
        ([replace(GOOD, target=0)], "same_instance"),
        ([replace(GOOD, request=2, source=1, target=0)], "not_movable"),
        ([replace(GOOD, target=2)], "closed_target"),
        ([replace(GOOD, gain=float("nan"))], "gain"),
        ([replace(GOOD, gain=None)], "gain"),
        ([replace(GOOD, reason="")], "reason"),
    ],
)
def test_bad_moves_are_told_apart(moves: object, kind: str) -> None:
    with pytest.raises(DecisionError, match="rebalance policy 'given' ") as caught:
        decide_moves(Given(moves), VIEW)
    assert caught.value.kind == kind
