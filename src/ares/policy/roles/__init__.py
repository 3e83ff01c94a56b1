"""Role policies: how many instances are to prefill, and how many to decode."""

from ares.policy.roles.base import (
    ROLE_POLICIES,
    RoleChange,
    RolePlan,
    RolePool,
    Roles,
    plan_roles,
    role_policy,
)
from ares.policy.roles.load import decode_load, mean_step, objective_s
from ares.policy.roles.pressure import Pressure, PressureSettings

__all__ = [
    "ROLE_POLICIES",
    "Pressure",
    "PressureSettings",
    "RoleChange",
    "RolePlan",
    "RolePool",
    "Roles",
    "decode_load",
    "mean_step",
    "objective_s",
    "plan_roles",
    "role_policy",
]
