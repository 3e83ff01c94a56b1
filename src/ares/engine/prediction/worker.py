"""The worker that predicts and records from hidden states (`ares worker` sets `--worker-cls` to it).

Serving never depends on it: a predictor or recorder that fails is logged once and switched off (I7).
"""

import logging
import time
from pathlib import Path
from typing import Any

from ares.engine import identity
from ares.engine.learning.folder import LearningFolder
from ares.engine.learning.spool import Spool
from ares.engine.logs import follow_vllm
from ares.engine.prediction.hidden_state_worker import HiddenStateWorker
from ares.engine.prediction.hidden_states import Step
from ares.engine.prediction.live_predictor import LivePredictor
from ares.engine.prediction.metadata import attach_pending
from ares.engine.prediction.predictor_swap import PredictorSwap
from ares.engine.prediction.recorded_states import RecordedStates
from ares.engine.prediction.recorder import DataFolder, Recorder
from ares.engine.prediction.recording_sample import AtOnce, FixedShare
from ares.engine.vllm_api import PlatformWorker
from ares.predictor import checkpoint
from ares.predictor.shards import HIDDEN_STATE, LIVE, Source

logger = logging.getLogger(__name__)


class PredictingWorker(HiddenStateWorker):
    """The platform's worker that predicts and records by its instance's settings."""

    _live: LivePredictor | None = None
    _failed = False
    _swap: PredictorSwap | None = None
    _recorder: Recorder | None = None
    _recorded: RecordedStates | None = None
    _on = True

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, and on the first rank of a tensor-parallel group the predictor and the recorder.

        All ranks have the same hidden states: another one would record every output once more.
        """
        follow_vllm()
        super().load_model(**kwargs)
        if self.rank % self.vllm_config.parallel_config.tensor_parallel_size:
            return
        settings = identity.current()
        if settings.predictor:
            self._live = self._make_predictor(Path(settings.predictor), settings)
        self._recorder = self._make_recorder(settings)
        if settings.learn_folder:
            self._swap = PredictorSwap(
                LearningFolder(Path(settings.learn_folder)),
                lambda file: self._make_predictor(file, settings),
                settings.predictor_version,
            )

    def _make_predictor(self, file: Path, settings: identity.InstanceSettings) -> LivePredictor:
        """Load a checkpoint; PredictorError where it is broken or does not fit."""
        loaded = checkpoint.load(file)
        loaded.check(settings.model, int(self.vllm_config.model_config.get_hidden_size()), HIDDEN_STATE)
        slots = self.vllm_config.scheduler_config.max_num_seqs
        return LivePredictor(loaded, slots, str(self.device), settings.predict_every)

    def _make_recorder(self, settings: identity.InstanceSettings) -> Recorder | None:
        config = self.vllm_config.model_config
        hidden_size, limit = int(config.get_hidden_size()), int(config.max_model_len)
        source = Source(settings.model, hidden_size, settings.predict_every, limit, LIVE)
        if settings.learn_folder:
            spool = Spool(LearningFolder(Path(settings.learn_folder)).recorded)
            return Recorder(spool, AtOnce(settings.record_at_once), source, token_ids=settings.record_token_ids)
        if settings.record_folder:
            folder = DataFolder(Path(settings.record_folder))
            return Recorder(folder, FixedShare(settings.record_fraction), source, token_ids=True)
        return None

    def compile_or_warm_up_model(self) -> Any:
        """Compile the model; only then may another thread use the GPU, whose work a CUDA graph could capture."""
        result = super().compile_or_warm_up_model()
        if self._swap is not None:
            self._swap.start()
        return result

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
        if attach_pending(output, failed=self._failed):
            self._failed = False
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
        if self._swap is not None and (new := self._swap.take()) is not None:
            # Running requests keep their predictions until they have new ones, in the next few steps.
            if new.live is None and self._live is not None:
                self._live.withdraw()
            self._live = new.live
        if self._live is not None:
            try:
                self._live.step(step)
            except Exception:
                logger.exception("the predictor failed and is off; serving continues")
                self._live.withdraw()
                self._live, self._failed = None, True
                if self._swap is not None:
                    self._swap.fail()
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
