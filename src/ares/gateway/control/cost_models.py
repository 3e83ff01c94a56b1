"""Cost models fitted online: the step time of an instance, and the stall of a move."""

import numpy as np

from ares.policy.cluster import FloatArray
from ares.policy.cost_model import OnlineLeastSquares
from ares.policy.kv_layout import KvLayout
from ares.protocol import messages
from ares.protocol.fields import RequestState


class StepTimeModel:
    """Fits base + request x running + token x resident, in seconds, to an instance's telemetry.

    Resident tokens are KV tokens (policy/kv_layout.py), as in the policy: attention reads no more than they stand for.
    """

    def __init__(self, layout: KvLayout) -> None:
        self._layout = layout
        self._fit = OnlineLeastSquares(3)
        self._last: messages.Telemetry | None = None

    def observe(self, load: messages.Telemetry) -> None:
        """Fit the steps since the last telemetry; a restarted instance starts over."""
        last, self._last = self._last, load
        if last is None or load.steps <= last.steps or load.busy_s <= last.busy_s:
            return
        # The load in between is the mean of both ends; where requests came or went, it is unknown.
        if last.running != load.running or not load.running:
            return
        resident = (self._resident(last) + self._resident(load)) / 2.0
        step_s = (load.busy_s - last.busy_s) / (load.steps - last.steps)
        self._fit.add(np.array([1.0, load.running, resident]), step_s)

    @property
    def coefficients(self) -> FloatArray | None:
        """Base, per request and per token, shape (3,); None before enough steps were seen."""
        return self._fit.coefficients

    def _resident(self, load: messages.Telemetry) -> float:
        running = (row.resident for row in load.rows if row.state == RequestState.RUNNING)
        return float(sum(map(self._layout.kv_tokens, running)))


class TransferModel:
    """Fits the client-visible stall of moves, pause + token x pulled tokens, in seconds."""

    def __init__(self) -> None:
        self._fit = OnlineLeastSquares(2, forgetting=0.98, minimum=5)

    def observe(self, pulled_tokens: int, stall_s: float) -> None:
        """Fit a move that succeeded."""
        self._fit.add(np.array([1.0, float(pulled_tokens)]), stall_s)

    @property
    def pause_s(self) -> float | None:
        """Seconds that a move of no tokens would stall a stream; None before enough moves were seen."""
        return float(self._fit.coefficients[0]) if self._fit.coefficients is not None else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens pulled per second; None before enough moves were seen."""
        return 1.0 / max(float(self._fit.coefficients[1]), 1e-9) if self._fit.coefficients is not None else None
