"""Hidden states and times that `ares check` asks a worker for (`collective_rpc`, vLLM's development mode)."""

from typing import Any

from ares.engine.prediction.hidden_states import HookedRequest, Step
from ares.protocol import messages

# A check takes a few dozen states; one that is forgotten must not fill the memory.
_MOST = 256


class RecordedStates:
    """The states of one gateway's requests, by the number of tokens up to each, and the predictor's time in steps.

    Parameters
    ----------
    gateway
        Name of the gateway whose requests are recorded.
    """

    def __init__(self, gateway: str) -> None:
        self._gateway = gateway
        self._states: dict[str, list[float]] = {}
        self._steps = 0
        self._predictor_s = 0.0

    def add(self, step: Step, predictor_s: float) -> None:
        """Record a step, in which the predictor took `predictor_s`."""
        if step.states is None:
            return
        due = [(n, r) for n, r in enumerate(step.requests) if r.position >= 0 and self._is_ours(r)]
        if due:
            self._steps += 1
            self._predictor_s += predictor_s
        for n, request in due if len(self._states) < _MOST else []:
            self._states[str(len(request.prompt_tokens) + request.position)] = step.states[n].float().tolist()

    def take(self) -> dict[str, Any]:
        """Return what has been recorded since the last call."""
        taken = {"states": self._states, "steps": self._steps, "predictor_s": self._predictor_s}
        self._states, self._steps, self._predictor_s = {}, 0, 0.0
        return taken

    def _is_ours(self, request: HookedRequest) -> bool:
        return request.key is not None and messages.owner(request.key) == self._gateway
