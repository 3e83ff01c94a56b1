"""The live worker: the tap with a predictor and a recorder behind it (`ares worker` sets `--worker-cls` to it).

Serving never depends on it: whatever fails here is logged once and switched off, and requests run unpredicted (I7).
"""

import logging
from pathlib import Path
from typing import Any

import torch

from ares import wire
from ares.engine import instance
from ares.engine.predictions import OUTBOX, Prediction, attach
from ares.engine.recorder import Recorder
from ares.engine.tap import Step
from ares.engine.tapped_worker import TappedWorker
from ares.engine.vllm_names import PlatformWorker
from ares.predictor import checkpoint, hazard
from ares.predictor.runtime import Predictor

logger = logging.getLogger(__name__)


class PredictingWorker(TappedWorker):
    """The platform's worker that predicts and records as its instance's settings say."""

    _live: "LivePredictor | None" = None
    _recorder: Recorder | None = None
    _on = True

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, then what looks at its states."""
        super().load_model(**kwargs)
        settings = instance.current()
        slots = self.vllm_config.scheduler_config.max_num_seqs
        if settings.predictor:
            loaded = checkpoint.load(Path(settings.predictor))
            waits = settings.role == "prefill"
            self._live = LivePredictor(loaded, slots, str(self.device), settings.predict_every, waits=waits)
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
        """Run the model, tapped while it is switched on."""
        return (
            super().execute_model(scheduler_output)
            if self._on
            else PlatformWorker.execute_model(self, scheduler_output)
        )

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, look at the step, and let the predictions leave with it."""
        if not self._on:
            return PlatformWorker.sample_tokens(self, grammar_output)
        output = super().sample_tokens(grammar_output)
        attach(output)
        return output

    def ares_predict(self, state: str) -> None:
        """Switch tap, predictor and recorder ``on`` or ``off`` (`ares bench predictor`); what runs is forgotten."""
        self.on_step(self.tap.restart())
        self._on = state == "on"

    def on_step(self, step: Step) -> None:
        """Predict and record."""
        if self._live is not None:
            try:
                self._live.step(step)
            except Exception:
                logger.exception("the predictor failed and is off; serving goes on")
                self._live = None
                OUTBOX.clear()
        if self._recorder is not None:
            try:
                self._recorder.step(step)
            except Exception:
                logger.exception("the recorder failed and is off; serving goes on")
                self._recorder = None

    def shutdown(self) -> None:
        """Write what is recorded so far."""
        if self._recorder is not None:
            self._recorder.close()
        super().shutdown()


class LivePredictor:
    """Predicts for all running requests every `every` steps, and for a new one at once.

    On a GPU nothing waits: the quantiles are copied to the host behind the step and read in a later one. Only a prefill
    instance waits for them (`waits`): a prefill has no later step, and nobody decodes beside it.
    """

    def __init__(
        self, loaded: checkpoint.Checkpoint, slots: int, device: str, every: int, *, waits: bool = False
    ) -> None:
        self._predictor = Predictor(loaded, slots, device)
        self._device = device
        self._every = every
        self._waits = waits
        self._free = list(range(slots))
        self._slots: dict[str, int] = {}
        self._steps = 0
        self._pending: tuple[Any, list[tuple[str, int]], Any] | None = None
        levels = torch.tensor(hazard.LEVELS)
        # Between the two levels that frame each wanted one.
        right = torch.searchsorted(levels, torch.tensor(wire.REMAINING_LEVELS)).clamp(1, len(levels) - 1)
        share = (torch.tensor(wire.REMAINING_LEVELS) - levels[right - 1]) / (levels[right] - levels[right - 1])
        self._right, self._share = right.to(device), share.to(device)

    def step(self, step: Step) -> None:
        """Look at one step."""
        self._collect()
        for request in step.finished:
            if (slot := self._slots.pop(request.id, None)) is not None:
                self._predictor.forget(slot)
                self._free.append(slot)
                OUTBOX.pop(request.id, None)
        if step.states is None:
            return
        self._steps += 1
        everybody = self._steps % self._every == 0
        rows, slots, positions, prompts, names = [], [], [], [], []
        for n, request in enumerate(step.requests):
            slot = self._slots.get(request.id)
            if request.position < 0 or request.ahead or not (everybody or slot is None):
                continue
            if slot is None:
                if not self._free:
                    continue
                slot = self._slots[request.id] = self._free.pop()
            rows.append(n)
            slots.append(slot)
            positions.append(request.position + request.generated_before)
            prompts.append(len(request.prompt_tokens) - request.generated_before)
            names.append((request.id, request.position))
        if rows:
            self._predict(step.states, rows, slots, positions, prompts, names)

    def _predict(
        self,
        states: torch.Tensor,
        rows: list[int],
        slots: list[int],
        positions: list[int],
        prompts: list[int],
        names: list[tuple[str, int]],
    ) -> None:
        index = torch.tensor([rows, slots, positions, prompts]).to(self._device, non_blocking=True)
        quantiles = self._predictor.predict(index[1], states[index[0]], index[2], index[3])
        left = quantiles[:, self._right - 1]
        wanted = left + self._share * (quantiles[:, self._right] - left)
        if wanted.device.type == "cpu" or self._waits:
            self._post(wanted.cpu(), names)
            return
        self._collect(wait=True)
        host = torch.empty(wanted.shape, dtype=wanted.dtype, pin_memory=True)
        host.copy_(wanted, non_blocking=True)
        event = torch.Event(device=wanted.device)
        event.record()
        self._pending = (host, names, event)

    def _collect(self, *, wait: bool = False) -> None:
        """Post the predictions that have reached the host; `wait` only where new ones are already due."""
        if self._pending is None:
            return
        host, names, event = self._pending
        if wait:
            event.synchronize()
        if wait or event.query():
            self._pending = None
            self._post(host, names)

    def _post(self, quantiles: torch.Tensor, names: list[tuple[str, int]]) -> None:
        finite = torch.isfinite(quantiles).all(1).tolist()
        for (name, output), row, good in zip(names, quantiles.tolist(), finite, strict=True):
            # What is not a number must never reach a decision; the request runs unpredicted.
            if good and name in self._slots:
                low, middle, high = row
                OUTBOX[name] = Prediction(output, (low, middle, high))
            else:
                OUTBOX.pop(name, None)
