"""Predictions on their way from the decode worker to the telemetry.

The worker puts them into `OUTBOX` and attaches them to the step's own output (vLLM's KVConnectorWorkerMetadata), with
which they reach the scheduler's process: a prefill has no later step.
"""

from dataclasses import dataclass, field
from typing import Any

from ares.engine.prediction.hidden_states import unwrapped
from ares.engine.vllm_api import KVConnectorWorkerMetadata


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is expected of a request after `output` tokens on this instance: quantiles at messages.REMAINING_LEVELS."""

    output: int
    remaining: tuple[float, float, float]

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


def attach(output: Any) -> None:
    """Empty the outbox into a step's output; where this rank has none, leave it for the next."""
    if not OUTBOX:
        return
    carrier = getattr(unwrapped(output)[0], "kv_connector_output", None)
    if carrier is not None:
        carrier.kv_connector_worker_meta = PredictionMetadata(dict(OUTBOX))
        OUTBOX.clear()
