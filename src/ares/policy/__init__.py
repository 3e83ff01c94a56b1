"""Decisions, pure: arrays in, moves out. No I/O, no clock, no torch, no vLLM.

The live controller and the simulator run this code unchanged.
"""

from ares.policy.admission import (
    ADMISSIONS,
    Admission,
    AdmissionDecision,
    AdmissionSettings,
    Candidates,
    Progress,
    SuspendSettings,
    admission_policy,
    decide_admissions,
)
from ares.policy.base import DecisionError, Policy
from ares.policy.cluster import Cluster
from ares.policy.copies import COPIERS, Copies, Copyable, CopyDecision, copier, decide_copies
from ares.policy.dispatch import DISPATCHERS, Dispatch, choose_instance, dispatcher
from ares.policy.forecast import Forecast, forecast
from ares.policy.prefill import PREFILLS, Places, Prefill, choose_place, prefill_policy
from ares.policy.presets import PRESETS, Preset, preset
from ares.policy.rebalance import REBALANCERS, MigrationDecision, Rebalance, decide_moves, rebalancer
from ares.policy.registering import REGISTRIES, register

__all__ = [
    "ADMISSIONS",
    "COPIERS",
    "DISPATCHERS",
    "PREFILLS",
    "PRESETS",
    "REBALANCERS",
    "REGISTRIES",
    "Admission",
    "AdmissionDecision",
    "AdmissionSettings",
    "Candidates",
    "Cluster",
    "Copies",
    "CopyDecision",
    "Copyable",
    "DecisionError",
    "Dispatch",
    "Forecast",
    "MigrationDecision",
    "Places",
    "Policy",
    "Prefill",
    "Preset",
    "Progress",
    "Rebalance",
    "SuspendSettings",
    "admission_policy",
    "choose_instance",
    "choose_place",
    "copier",
    "decide_admissions",
    "decide_copies",
    "decide_moves",
    "dispatcher",
    "forecast",
    "prefill_policy",
    "preset",
    "rebalancer",
    "register",
]
