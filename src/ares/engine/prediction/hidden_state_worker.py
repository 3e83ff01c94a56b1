"""vLLM's worker with the tap in it (`--worker-cls`), for collecting; the live worker builds on it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ares.engine.connector.resume_output import RestoringWorker
from ares.engine.prediction.hidden_states import HiddenStateHook, Step
from ares.predictor.shards import half


class HiddenStateWorker(RestoringWorker):
    """The platform's worker that sees every step's hidden states."""

    tap: HiddenStateHook

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, then tap it."""
        super().load_model(**kwargs)
        self.tap = HiddenStateHook(self.model_runner.get_model())

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run the model; a step that samples nothing ends here."""
        self.tap.begin(scheduler_output)
        output = super().execute_model(scheduler_output)
        if output is not None and (step := self.tap.end(output)) is not None:
            self.on_step(step)
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, then look at the step."""
        output = super().sample_tokens(grammar_output)
        if (step := self.tap.end(output)) is not None:
            self.on_step(step)
        return output

    def on_step(self, step: Step) -> None:
        """Do something with a step's states. They are vLLM's own memory: copy what is to be kept."""
        raise NotImplementedError


class CollectingWorker(HiddenStateWorker):
    """Keeps the states of every k-th token until they are asked for (`collective_rpc`)."""

    _every = 0
    _kept: list[tuple[str, int, NDArray[np.float16]]]

    def ares_collect_every(self, every: int) -> None:
        """Begin to keep states, every so many tokens."""
        self._every = every
        self._kept = []

    def ares_take(self) -> list[tuple[str, int, NDArray[np.float16]]]:
        """Return (vLLM's request id, position, state) of what was kept since the last call."""
        kept, self._kept = self._kept, []
        return kept

    def on_step(self, step: Step) -> None:
        """Keep the states that are due."""
        if not self._every or step.states is None:
            return
        due = [n for n, r in enumerate(step.requests) if r.position >= 0 and r.position % self._every == 0]
        if due:
            states = half(step.states[due].float().cpu().numpy())
            self._kept.extend((step.requests[n].id, step.requests[n].position, states[i]) for i, n in enumerate(due))
