"""vLLM's worker with the hidden-state hook (`--worker-cls`), and the one that collects training data."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ares.engine.connector.resume_output import ResumeOutputWorker
from ares.engine.prediction.hidden_states import HiddenStateHook, Step
from ares.predictor.shards import half


class HiddenStateWorker(ResumeOutputWorker):
    """The platform's worker with access to the hidden states of every step."""

    hook: HiddenStateHook

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, then hook into it."""
        super().load_model(**kwargs)
        self.hook = HiddenStateHook(self.model_runner.get_model())

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run the model; a step that samples nothing ends here."""
        self.hook.begin(scheduler_output)
        output = super().execute_model(scheduler_output)
        if output is not None and (step := self.hook.end(output)) is not None:
            self.on_step(step)
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, then process the step's hidden states."""
        output = super().sample_tokens(grammar_output)
        if (step := self.hook.end(output)) is not None:
            self.on_step(step)
        return output

    def on_step(self, step: Step) -> None:
        """Process a step's hidden states. They are in vLLM's own memory: copy what is to be kept."""
        raise NotImplementedError


class CollectingWorker(HiddenStateWorker):
    """Keeps the states of every k-th token until the driver takes them (`collective_rpc`)."""

    _every = 0
    _kept: list[tuple[str, int, NDArray[np.float16]]]

    def ares_collect_every(self, every: int) -> None:
        """Keep the state of every `every`-th token from now on; 0 keeps none."""
        self._every = every
        self._kept = []

    def ares_take(self) -> list[tuple[str, int, NDArray[np.float16]]]:
        """Return (vLLM's request id, position, state) for the states kept since the last call."""
        kept, self._kept = self._kept, []
        return kept

    def on_step(self, step: Step) -> None:
        """Keep the states of the positions that are due."""
        if not self._every or step.states is None:
            return
        due = [n for n, r in enumerate(step.requests) if r.position >= 0 and r.position % self._every == 0]
        if due:
            states = half(step.states[due].float().cpu().numpy())
            self._kept.extend((step.requests[n].id, step.requests[n].position, states[i]) for i, n in enumerate(due))
