"""How long an engine computes: the time of its steps, from their scheduling to their results.

vLLM schedules a step, and later updates its scheduler from the result, in the same order (v1/engine/core.py, 0.32:
`step`, `step_with_batch_queue`). With asynchronous scheduling the next step is scheduled while one runs, often an empty
one: the time between two schedulings is then no step's time.
"""

from collections import deque
from typing import NamedTuple

# Weight of the newest step in the moving average of the step time.
_STEP_WEIGHT = 0.1
# Steps that vLLM schedules before it takes a result; more were never completed.
_MOST_IN_FLIGHT = 8


class StepTotals(NamedTuple):
    """Totals of the steps so far, and the moving average of their time."""

    steps: int = 0
    busy_s: float = 0.0
    prompt_tokens: int = 0
    step_time_s: float = 0.0


class StepTimes:
    """Measures the steps of one engine. Its thread calls both methods; others may read `totals`.

    Attributes
    ----------
    totals
        Of the completed steps that computed anything; replaced as a whole.
    """

    def __init__(self) -> None:
        self.totals = StepTotals()
        # Of each scheduled step, the oldest first: prompt tokens, None where it computes nothing.
        self._in_flight: deque[int | None] = deque(maxlen=_MOST_IN_FLIGHT)
        # When the step that runs began: with the end of the one before it, if the engine was not idle in between.
        self._began: float | None = None

    def scheduled(self, now: float, tokens: int, prompt_tokens: int) -> None:
        """Note a scheduled step of so many tokens, some of them of prompts."""
        if not tokens:
            if not self._running():
                self._began = None
        elif self._began is None:
            self._began = now
        self._in_flight.append(prompt_tokens if tokens else None)

    def completed(self, now: float, *, idle: bool) -> None:
        """Note the result of the oldest step in flight; `idle`: no request is left."""
        prompt_tokens = self._in_flight.popleft() if self._in_flight else None
        if prompt_tokens is not None and self._began is not None:
            step_s = now - self._began
            before = self.totals
            weight = _STEP_WEIGHT if before.steps else 1.0
            self.totals = StepTotals(
                steps=before.steps + 1,
                busy_s=before.busy_s + step_s,
                prompt_tokens=before.prompt_tokens + prompt_tokens,
                step_time_s=before.step_time_s + (step_s - before.step_time_s) * weight,
            )
            self._began = now
        if idle and not self._running():
            self._began = None

    def _running(self) -> bool:
        return any(prompt_tokens is not None for prompt_tokens in self._in_flight)
