"""`open`: every request goes at once to the instance that dispatch chooses; vLLM does the rest."""

from dataclasses import dataclass

from ares.policy.admission.base import Admission, register
from ares.policy.admission.order import check_order, is_by_memory_time


@dataclass(frozen=True, slots=True)
class OpenSettings:
    """Settings of `open`.

    Attributes
    ----------
    order
        `shortest_memory_time` or `fcfs` (order.py): which request an instance preempts; none waits outside decode.
    """

    order: str = "fcfs"

    def __post_init__(self) -> None:
        check_order(self.order)


@register("open")
class Open(Admission):
    """Admits every request at once."""

    Settings = OpenSettings
    settings: OpenSettings
    queues_requests = False

    @classmethod
    def uses_predictions(cls, settings: OpenSettings) -> bool:
        """Return whether instances preempt by predicted memory-time."""
        return is_by_memory_time(settings.order)

    @classmethod
    def preempts_largest(cls, settings: OpenSettings) -> bool:
        """Return whether instances preempt by predicted memory-time."""
        return is_by_memory_time(settings.order)
