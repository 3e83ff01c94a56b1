"""Cost models fitted online: the step time of an instance, its time for prompts, and the stall of a move."""

import numpy as np

from ares.policy.cluster import FloatArray
from ares.policy.cost_model import OnlineLeastSquares
from ares.policy.kv_layout import KvLayout
from ares.protocol import messages
from ares.protocol.fields import RequestState

# Weight of a measurement of prompts relative to the one after it.
_PREFILL_FORGETTING = 0.98


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


class PrefillTimeModel:
    """Fits step + token x prompt tokens, in seconds, to the telemetry of an instance that only prefills.

    By what the instance has computed, and not by when its answers arrive: it computes several prompts in one step, and
    those of other gateways too.
    """

    def __init__(self) -> None:
        self._fit = OnlineLeastSquares(2, forgetting=_PREFILL_FORGETTING, minimum=4)
        self._last: messages.Telemetry | None = None
        # Of the steps so far, older ones counting less.
        self._seconds = self._tokens = 0.0

    def observe(self, load: messages.Telemetry) -> None:
        """Fit the steps since the last telemetry, if all of them were for prompts."""
        last, self._last = self._last, load
        # It has the role only once nothing decodes there any more.
        if last is None or last.role != "prefill" or load.role != "prefill":
            return
        steps, tokens = load.steps - last.steps, load.prompt_tokens - last.prompt_tokens
        seconds = load.busy_s - last.busy_s
        if steps <= 0 or tokens <= 0 or seconds <= 0:
            return
        self._fit.add(np.array([float(steps), float(tokens)]), seconds)
        self._seconds = _PREFILL_FORGETTING * self._seconds + seconds
        self._tokens = _PREFILL_FORGETTING * self._tokens + tokens

    @property
    def coefficients(self) -> tuple[float, float] | None:
        """Seconds of a step and of each prompt token in it; None before the first prompt was computed."""
        fitted = self._fit.coefficients
        if fitted is not None:
            return float(fitted[0]), float(fitted[1])
        mean = self.mean_token_s
        return None if mean is None else (0.0, mean)

    @property
    def mean_token_s(self) -> float | None:
        """Mean seconds per prompt token, that of its step included; None before the first prompt was computed."""
        return self._seconds / self._tokens if self._tokens else None


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
