"""Admission: when a prefilled request enters decode and where, and which running request makes room for it."""

from ares.policy.admission.forecast import Candidates, Entrance, Entry, Progress
from ares.policy.admission.order import QUEUES, memory_time
from ares.policy.admission.settings import ADMISSIONS, AdmissionSettings
from ares.policy.admission.suspension import SuspendSettings

__all__ = [
    "ADMISSIONS",
    "QUEUES",
    "AdmissionSettings",
    "Candidates",
    "Entrance",
    "Entry",
    "Progress",
    "SuspendSettings",
    "memory_time",
]
