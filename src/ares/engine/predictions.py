"""Predictions on their way from the decode worker to the telemetry.

The worker puts them into `OUTBOX`; the connector's worker side, in the same process, takes them out with the next
step's output (vLLM's KVConnectorWorkerMetadata), so that they reach the scheduler's process one step later.
"""

from dataclasses import dataclass, field

from ares.engine.vllm_names import KVConnectorWorkerMetadata


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is expected of a request after `output` tokens on this instance: quantiles at wire.REMAINING_LEVELS."""

    output: int
    remaining: tuple[float, ...]

    def after(self, output: int, most: int) -> tuple[float, float, float]:
        """Return the quantiles counted down to `output` tokens, at most `most`; who still runs has at least one."""
        since = output - self.output
        low, middle, high = (max(1.0, min(value - since, float(most))) for value in self.remaining)
        return low, middle, high


@dataclass
class PredictionMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """New predictions by vLLM's request id."""

    predictions: dict[str, Prediction] = field(default_factory=dict)

    def aggregate(self, other: "KVConnectorWorkerMetadata") -> "KVConnectorWorkerMetadata":
        """Keep one: every rank of a tensor-parallel group computes the same."""
        return self if self.predictions else other


OUTBOX: dict[str, Prediction] = {}


def take() -> PredictionMetadata | None:
    """Empty the outbox; None where there is nothing in it."""
    if not OUTBOX:
        return None
    taken = PredictionMetadata(dict(OUTBOX))
    OUTBOX.clear()
    return taken
