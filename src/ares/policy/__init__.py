"""Decisions, pure: arrays in, moves out. No I/O, no clock, no torch, no vLLM.

The live controller and the simulator run this code unchanged.
"""

from ares.policy.admission import AdmissionSettings, SuspendSettings
from ares.policy.cluster import Cluster
from ares.policy.dispatch import Dispatch, dispatcher
from ares.policy.forecast import Forecast, forecast
from ares.policy.placement import DISPATCHERS
from ares.policy.presets import PRESETS, Preset, preset
from ares.policy.rebalance import REBALANCERS, DecisionError, Move, Rebalance, decide_moves, rebalancer, register

__all__ = [
    "DISPATCHERS",
    "PRESETS",
    "REBALANCERS",
    "AdmissionSettings",
    "Cluster",
    "DecisionError",
    "Dispatch",
    "Forecast",
    "Move",
    "Preset",
    "Rebalance",
    "SuspendSettings",
    "decide_moves",
    "dispatcher",
    "forecast",
    "preset",
    "rebalancer",
    "register",
]
