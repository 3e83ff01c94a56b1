"""The worker that predicts and records from hidden states (`ares worker` sets `--worker-cls` to it).

Serving never depends on it: a predictor or recorder that fails is logged once and switched off (I7).
"""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch

from ares.engine import identity
from ares.engine.prediction.hidden_state_worker import HiddenStateWorker
from ares.engine.prediction.hidden_states import HookedRequest, Step
from ares.engine.prediction.metadata import PENDING, Prediction, attach_pending
from ares.engine.prediction.recorded_states import RecordedStates
from ares.engine.prediction.recorder import Recorder
from ares.engine.vllm_api import PlatformWorker
from ares.predictor import checkpoint, hazard
from ares.predictor.runtime import Predictor
from ares.protocol import messages

logger = logging.getLogger(__name__)

# Steps between predictions of new requests, all together: one for many costs little more than one for one.
_NEW_EVERY = 5


class PredictingWorker(HiddenStateWorker):
    """The platform's worker that predicts and records by its instance's settings."""

    _live: "LivePredictor | None" = None
    _recorder: Recorder | None = None
    _recorded: RecordedStates | None = None
    _on = True

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, and on the first rank of a tensor-parallel group the predictor and the recorder.

        All ranks have the same hidden states: another one would record every output once more.
        """
        super().load_model(**kwargs)
        if self.rank % self.vllm_config.parallel_config.tensor_parallel_size:
            return
        settings = identity.current()
        slots = self.vllm_config.scheduler_config.max_num_seqs
        if settings.predictor:
            loaded = checkpoint.load(Path(settings.predictor))
            self._live = LivePredictor(loaded, slots, str(self.device), settings.predict_every)
        if settings.record_folder:
            config = self.vllm_config.model_config
            self._recorder = Recorder(
                Path(settings.record_folder),
                settings.record_fraction,
                settings.model,
                int(config.get_hidden_size()),
                int(config.max_model_len),
                settings.predict_every,
                config.hf_config.eos_token_id,
            )

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run the model; its hidden states are read while prediction is switched on."""
        return (
            super().execute_model(scheduler_output)
            if self._on
            else PlatformWorker.execute_model(self, scheduler_output)
        )

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, process the hidden states, and attach the predictions to the output."""
        if not self._on:
            return PlatformWorker.sample_tokens(self, grammar_output)
        output = super().sample_tokens(grammar_output)
        attach_pending(output)
        return output

    def ares_predict(self, state: str) -> None:
        """Switch all of this ``on`` or ``off`` (`ares bench predictor`); the running requests are forgotten."""
        self.on_step(self.hook.restart())
        self._on = state == "on"

    def ares_recorded_states(self, state: str, gateway: str) -> dict[str, Any]:
        """Record (`on`, `off`) the states of a gateway's requests, or return them (`take`), for `ares check`."""
        if state == "on":
            self._recorded = RecordedStates(gateway)
        taken = self._recorded.take() if self._recorded is not None else {}
        if state == "off":
            self._recorded = None
        return taken

    def on_step(self, step: Step) -> None:
        """Predict and record."""
        began = time.perf_counter()
        if self._live is not None:
            try:
                self._live.step(step)
            except Exception:
                logger.exception("the predictor failed and is off; serving continues")
                self._live = None
                PENDING.clear()
        if self._recorded is not None:
            self._recorded.add(step, time.perf_counter() - began if self._live is not None else 0.0)
        if self._recorder is not None:
            try:
                self._recorder.step(step)
            except Exception:
                logger.exception("the recorder failed and is off; serving continues")
                self._recorder = None

    def shutdown(self) -> None:
        """Write what the recorder still holds."""
        if self._recorder is not None:
            self._recorder.close()
        super().shutdown()


class LivePredictor:
    """Predicts all running requests every `every` steps, and new requests together within their first few steps.

    A request that is only prefilled here has no later step: it is predicted in that step, with all other new requests.

    On a GPU no step waits for a prediction, except for one with a prefill: the quantiles are copied to the host after
    the step and read in a later one.
    """

    def __init__(self, loaded: checkpoint.Checkpoint, slots: int, device: str, every: int) -> None:
        self._predictor = Predictor(loaded, slots, device)
        self._device = device
        self._every = every
        self._free = list(range(slots))
        self._slots: dict[str, int] = {}
        self._steps = 0
        self._pending: tuple[Any, list[tuple[str, int]], Any] | None = None
        # Interpolates the quantiles at REMAINING_LEVELS between the two nearest levels of the predictor.
        levels, wanted = torch.tensor(hazard.LEVELS), torch.tensor(messages.REMAINING_LEVELS)
        right = torch.searchsorted(levels, wanted).clamp(1, len(levels) - 1)
        share = (wanted - levels[right - 1]) / (levels[right] - levels[right - 1])
        between, each = torch.zeros(len(levels), len(wanted)), torch.arange(len(wanted))
        between[right - 1, each], between[right, each] = 1 - share, share
        self._between = between.to(device)

    def step(self, step: Step) -> None:
        """Process one step."""
        if self._pending is not None:
            self._collect()
        for request in step.finished:
            if (slot := self._slots.pop(request.id, None)) is not None:
                self._free.append(slot)
                PENDING.pop(request.id, None)
        if step.states is None:
            return
        self._steps += 1
        if due := self._due(step.requests):
            self._predict(step.states, due)

    def _due(self, requests: list[HookedRequest]) -> list[tuple[int, HookedRequest]]:
        """Return the requests to predict in this step, each with its row."""
        everyone = self._steps % self._every == 0
        if self._steps % _NEW_EVERY and not everyone and not any(r.prefill_only and r.position >= 0 for r in requests):
            return []
        known = () if everyone else self._slots
        return [(n, r) for n, r in enumerate(requests) if r.position >= 0 and not r.is_precopy and r.id not in known]

    def _predict(self, states: torch.Tensor, due: list[tuple[int, HookedRequest]]) -> None:
        rows, slots, positions, prompts, names, fresh = [], [], [], [], [], []
        for n, request in due:
            slot = self._slots.get(request.id)
            if slot is None:
                if not self._free:
                    continue
                slot = self._slots[request.id] = self._free.pop()
                fresh.append(slot)
            rows.append(n)
            slots.append(slot)
            positions.append(request.position + request.generated_before)
            prompts.append(len(request.prompt_tokens) - request.generated_before)
            names.append((request.id, request.position))
        if not rows:
            return
        if fresh:
            self._predictor.forget(fresh)
        index = torch.tensor([rows, slots, positions, prompts]).to(self._device, non_blocking=True)
        wanted = self._predictor.predict(index[1], states[index[0]], index[2], index[3]) @ self._between
        self._collect(wait=True)
        if wanted.device.type == "cpu" or any(request.prefill_only for _, request in due):
            self._post(wanted, names)
            return
        host = torch.empty(wanted.shape, dtype=wanted.dtype, pin_memory=True)
        host.copy_(wanted, non_blocking=True)
        event = torch.Event(device=wanted.device)
        event.record()
        self._pending = (host, names, event)

    def _collect(self, *, wait: bool = False) -> None:
        """Post the predictions that have reached the host; `wait` for them where the next ones are due already."""
        if self._pending is None:
            return
        host, names, event = self._pending
        if wait:
            event.synchronize()
        if wait or event.query():
            self._pending = None
            self._post(host, names)

    def _post(self, quantiles: torch.Tensor, names: list[tuple[str, int]]) -> None:
        for (name, output), (low, middle, high) in zip(names, quantiles.tolist(), strict=True):
            # A value that is not finite must never reach a decision: the request then has no prediction.
            if math.isfinite(low + middle + high) and name in self._slots:
                PENDING[name] = Prediction(output, (low, middle, high))
            else:
                PENDING.pop(name, None)
