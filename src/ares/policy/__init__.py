"""Decisions, pure: arrays in, moves out. No I/O, no clock, no torch, no vLLM.

The live controller and the simulator run this code unchanged.
"""

from ares.policy.admission import (
    ADMISSIONS,
    Admission,
    AdmissionSettings,
    Candidates,
    Entry,
    Progress,
    SuspendSettings,
    admission_policy,
    decide_entries,
)
from ares.policy.base import DecisionError, Policy
from ares.policy.cluster import Cluster
from ares.policy.dispatch import DISPATCHERS, Dispatch, choose_instance, dispatcher
from ares.policy.forecast import Forecast, forecast
from ares.policy.presets import PRESETS, Preset, preset
from ares.policy.rebalance import REBALANCERS, Move, Rebalance, decide_moves, rebalancer
from ares.policy.registering import REGISTRIES, register

__all__ = [
    "ADMISSIONS",
    "DISPATCHERS",
    "PRESETS",
    "REBALANCERS",
    "REGISTRIES",
    "Admission",
    "AdmissionSettings",
    "Candidates",
    "Cluster",
    "DecisionError",
    "Dispatch",
    "Entry",
    "Forecast",
    "Move",
    "Policy",
    "Preset",
    "Progress",
    "Rebalance",
    "SuspendSettings",
    "admission_policy",
    "choose_instance",
    "decide_entries",
    "decide_moves",
    "dispatcher",
    "forecast",
    "preset",
    "rebalancer",
    "register",
]
