"""Prefill: where a prompt is computed. One file per policy; base.py defines what one is."""

from ares.policy.prefill import fewest_requests, least_time, longest_prefix, round_robin  # each registers itself
from ares.policy.prefill.base import PREFILLS, Places, Prefill, choose_place, prefill_policy, register

__all__ = [
    "PREFILLS",
    "Places",
    "Prefill",
    "choose_place",
    "fewest_requests",
    "least_time",
    "longest_prefix",
    "prefill_policy",
    "register",
    "round_robin",
]
