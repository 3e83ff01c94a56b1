"""Predictions on their way from the worker to the scheduler, which reports them.

The worker collects them in `PENDING` and attaches them to the output of the same step (vLLM's
KVConnectorWorkerMetadata): a request that is only prefilled here has no later step.
"""

from dataclasses import dataclass, field
from typing import Any

from ares.engine.prediction.carried_forecast import Carried
from ares.engine.prediction.hidden_states import unwrapped
from ares.engine.vllm_api import KVConnectorWorkerMetadata


@dataclass(frozen=True, slots=True)
class Prediction:
    """A prediction for a request.

    Attributes
    ----------
    output_tokens
        How many tokens the request had generated on this instance.
    remaining
        Quantiles of the tokens still to come, at `messages.REMAINING_LEVELS`.
    carried
        What the next instance of the request is to know; None where the network has no history.
    """

    output_tokens: int
    remaining: tuple[float, float, float]
    carried: Carried | None = field(default=None, compare=False)

    def after(self, output_tokens: int, limit: int) -> tuple[float, float, float]:
        """Return the quantiles when the request has generated `output_tokens`, each from 1 to `limit` tokens."""
        since = output_tokens - self.output_tokens
        low, middle, high = (max(1.0, min(value - since, float(limit))) for value in self.remaining)
        return low, middle, high


@dataclass
class PredictionMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """New predictions of a step, by vLLM's request id; None where a request has none any more.

    `failed` is whether the predictor has failed and is off.
    """

    predictions: dict[str, Prediction | None] = field(default_factory=dict)
    failed: bool = False

    def aggregate(self, other: "KVConnectorWorkerMetadata") -> "KVConnectorWorkerMetadata":
        """Return the first rank's of a tensor-parallel group: the others do not predict."""
        return self if self.predictions or self.failed else other


# By vLLM's request id.
PENDING: dict[str, Prediction | None] = {}


def attach_pending(output: Any, *, failed: bool = False) -> bool:
    """Move the pending predictions into a step's output; where this rank has none, they wait for the next step.

    Return whether the output has taken them, and with them that the predictor has `failed`.
    """
    if not PENDING and not failed:
        return False
    carrier = getattr(unwrapped(output)[0], "kv_connector_output", None)
    if carrier is None:
        return False
    carrier.kv_connector_worker_meta = PredictionMetadata(dict(PENDING), failed)
    PENDING.clear()
    return True
