"""The result of a check: rows, each with an outcome, the measured value, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """How a check ended."""

    PASS = "pass"  # noqa: S105 - not a password
    WARN = "warn"
    FAIL = "fail"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one check.

    Attributes
    ----------
    group
        The part of the report that it belongs to.
    check
        What was checked, such as ``vLLM`` or ``prefill-0 -> decode-1``.
    value
        What was measured, or why it was not.
    advice
        What to do; empty where there is nothing to do.
    figures
        The numbers behind the value, for the JSON file.
    """

    group: str
    check: str
    outcome: Outcome
    value: str
    advice: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def failed(rows: Iterable[Row]) -> bool:
    """Whether any check has failed."""
    return any(row.outcome is Outcome.FAIL for row in rows)


def listed(names: Iterable[str], most: int = 4) -> str:
    """Return names as a list in a sentence; of many, the first ones and how many more."""
    every = list(names)
    shown = every if len(every) <= most else [*every[: most - 1], f"{len(every) - most + 1} more"]
    return ", ".join(shown)
