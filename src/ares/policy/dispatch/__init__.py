"""Dispatch: which decode instance a request enters first. One file per policy; base.py defines what one is."""

from ares.policy.dispatch import balanceroute, forecast, least_loaded, round_robin  # each registers itself
from ares.policy.dispatch.base import DISPATCHERS, Dispatch, choose_instance, dispatcher, register

__all__ = [
    "DISPATCHERS",
    "Dispatch",
    "balanceroute",
    "choose_instance",
    "dispatcher",
    "forecast",
    "least_loaded",
    "register",
    "round_robin",
]
