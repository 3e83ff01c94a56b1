"""`open`: every request goes to its instance at once, where dispatch puts it, and the rest is left to vLLM."""

from dataclasses import dataclass

from ares.policy.admission.base import Admission, register
from ares.policy.admission.order import check_order, is_by_volume


@dataclass(frozen=True, slots=True)
class OpenSettings:
    """Settings of `open`.

    Attributes
    ----------
    order
        `volume` or `fcfs` (order.py): whom an instance preempts. Nobody waits outside for an order.
    """

    order: str = "fcfs"

    def __post_init__(self) -> None:
        check_order(self.order)


@register("open")
class Open(Admission):
    """Holds nobody back."""

    Settings = OpenSettings
    settings: OpenSettings
    holds = False

    @classmethod
    def uses_predictions(cls, settings: OpenSettings) -> bool:
        """Return whether instances preempt by predicted memory-time."""
        return is_by_volume(settings.order)

    @classmethod
    def preempts_largest(cls, settings: OpenSettings) -> bool:
        """Return whether instances preempt by predicted memory-time."""
        return is_by_volume(settings.order)
