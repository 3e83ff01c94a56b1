"""Where a session is on its way from arrival to its last token."""

from enum import StrEnum


class Phase(StrEnum):
    """Phase of a session; its value is what the status calls it."""

    PREFILL = "prefill"
    """An instance computes its prompt, or after a suspension its tokens so far."""
    WAITING = "waiting"
    """Prefilled, it waits for admission."""
    STARTING = "starting"
    """Admitted, a decode instance is asked to take it."""
    DECODE = "decode"
    """A decode instance has taken it."""
    SUSPENDED = "suspended"
    """It has given its KV up and waits for admission again."""
