"""Copies: which running requests get a warm copy of their KV on another instance. base.py defines what one is."""

from ares.policy.copies import most_saved  # registers itself
from ares.policy.copies.base import COPIERS, Copies, Copyable, CopyDecision, copier, decide_copies, register

__all__ = [
    "COPIERS",
    "Copies",
    "CopyDecision",
    "Copyable",
    "copier",
    "decide_copies",
    "most_saved",
    "register",
]
