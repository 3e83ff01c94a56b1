"""Decisions, pure: arrays in, moves out. No I/O, no clock, no torch, no vLLM.

The live controller and the simulator run this code unchanged.
"""

from ares.policy.cluster import Cluster
from ares.policy.dispatch import DISPATCHERS, Dispatch, dispatcher
from ares.policy.presets import PRESETS, Preset, preset
from ares.policy.rebalance import REBALANCERS, Move, Rebalance, RebalanceSettings, rebalancer

__all__ = [
    "DISPATCHERS",
    "PRESETS",
    "REBALANCERS",
    "Cluster",
    "Dispatch",
    "Move",
    "Preset",
    "Rebalance",
    "RebalanceSettings",
    "dispatcher",
    "preset",
    "rebalancer",
]
