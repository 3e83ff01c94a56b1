"""Decisions, pure: arrays in, moves out. No I/O, no clock, no torch, no vLLM.

The live controller and the simulator run this code unchanged.
"""

from ares.policy.admission import AdmissionSettings, SuspendSettings
from ares.policy.cluster import Cluster
from ares.policy.dispatch import Dispatch, dispatcher
from ares.policy.forecast import Forecast, forecast
from ares.policy.moves import Move, RebalanceSettings
from ares.policy.placement import DISPATCHERS
from ares.policy.presets import PRESETS, Preset, preset
from ares.policy.rebalance import REBALANCERS, Rebalance, rebalancer

__all__ = [
    "DISPATCHERS",
    "PRESETS",
    "REBALANCERS",
    "AdmissionSettings",
    "Cluster",
    "Dispatch",
    "Forecast",
    "Move",
    "Preset",
    "Rebalance",
    "RebalanceSettings",
    "SuspendSettings",
    "dispatcher",
    "forecast",
    "preset",
    "rebalancer",
]
