"""Admission: when a prefilled request enters decode and where, and which running request makes room for it.

One file per policy; base.py defines what one is.
"""

from ares.policy.admission import past_future, pausing  # each registers itself
from ares.policy.admission.base import (
    ADMISSIONS,
    PREFILLED_KV_KEPT_S,
    Admission,
    AdmissionDecision,
    Candidates,
    Progress,
    admission_policy,
    check_admissions,
    decide_admissions,
    register,
)
from ares.policy.admission.forecast import Forecast, ForecastSettings
from ares.policy.admission.open import Open, OpenSettings
from ares.policy.admission.order import ORDERS, memory_time
from ares.policy.admission.settings import AdmissionSettings
from ares.policy.admission.suspension import SuspendSettings

__all__ = [
    "ADMISSIONS",
    "ORDERS",
    "PREFILLED_KV_KEPT_S",
    "Admission",
    "AdmissionDecision",
    "AdmissionSettings",
    "Candidates",
    "Forecast",
    "ForecastSettings",
    "Open",
    "OpenSettings",
    "Progress",
    "SuspendSettings",
    "admission_policy",
    "check_admissions",
    "decide_admissions",
    "memory_time",
    "past_future",
    "pausing",
    "register",
]
