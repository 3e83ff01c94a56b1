"""Rebalance: which running requests change instance, and why. One file per policy; base.py defines what one is."""

from ares.policy.base import DecisionError
from ares.policy.rebalance import ares, current_load, llumnix, none, paper  # each registers itself
from ares.policy.rebalance.base import (
    REBALANCERS,
    MigrationDecision,
    Rebalance,
    check_moves,
    decide_moves,
    rebalancer,
    register,
)

__all__ = [
    "REBALANCERS",
    "DecisionError",
    "MigrationDecision",
    "Rebalance",
    "ares",
    "check_moves",
    "current_load",
    "decide_moves",
    "llumnix",
    "none",
    "paper",
    "rebalancer",
    "register",
]
