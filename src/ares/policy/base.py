"""What all policies have in common: a name, settings, and one method that decides.

The gateway and the simulator call a policy through the functions next to its base class (dispatch/base.py,
admission/base.py, rebalance/base.py), so that failures and invalid decisions are detected in one place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True, slots=True)
class NoSettings:
    """Settings of a policy that has none."""


class Policy:
    """Base class of the kinds of policy; one object decides for a whole run, so it may keep state.

    Attributes
    ----------
    part
        What it decides: prefill, dispatch, admission, rebalance or copies.
    name
        The name it is registered by.
    Settings
        Frozen dataclass of its settings, each with a default. A method `for_objectives(ttft_s)` of it returns the
        settings for another objective of the first token, in seconds.
    predicts
        Whether it uses predicted lengths where there are any.
    needs_predictions
        Whether it cannot work without them.
    quick
        Whether it is known to decide in well under a millisecond; the gateway calls others in a thread of their own.
    """

    part: ClassVar[str] = ""
    name: ClassVar[str] = ""
    Settings: ClassVar[type] = NoSettings
    predicts: ClassVar[bool] = False
    needs_predictions: ClassVar[bool] = False
    quick: ClassVar[bool] = False
    settings: Any

    def __init__(self, settings: Any = None) -> None:
        self.settings = self.Settings() if settings is None else settings

    @classmethod
    def prepare(cls) -> None:
        """Compile or load what the first decision would otherwise wait for."""

    @classmethod
    def uses_predictions(cls, settings: Any) -> bool:
        """Return whether it uses predicted lengths with these settings."""
        return cls.predicts

    def memory(self) -> dict[str, float]:
        """Return the state that the next decision depends on besides its arguments; the decision log keeps it."""
        return {}

    def remember(self, memory: Mapping[str, float]) -> None:
        """Restore what `memory` had returned, to repeat the next decision."""


class DecisionError(ValueError):
    """A policy failed or made an invalid decision; `kind` names the fault."""

    def __init__(self, policy: str, kind: str, message: str, part: str = "rebalance") -> None:
        super().__init__(f"{part} policy {policy!r} {message}")
        self.kind = kind
        self.part = part


def raised(policy: Policy, error: Exception) -> DecisionError:
    """Return the DecisionError for an exception that a policy raised."""
    return DecisionError(policy.name, "raised", f"raised {type(error).__name__}: {error}"[:300], policy.part)


def is_index(value: object, count: int) -> bool:
    """Return whether a value is an index below `count`."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= int(value) < count


def is_finite(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float | np.number) and bool(np.isfinite(value))
