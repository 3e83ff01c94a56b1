"""Records hidden states of live requests as training data: their own outputs are the labels.

An output is complete where its last token is a stop token; one that ended by a limit, a cancellation or a migration is
censored.
"""

import hashlib
import logging
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from ares.engine.prediction.hidden_states import HookedRequest, Step
from ares.predictor.errors import PredictorError
from ares.predictor.shards import Output, Source, half, write

logger = logging.getLogger(__name__)

# A shard is written when this many outputs have ended, and at this interval.
_SHARD_OUTPUTS = 64
_SHARD_S = 10.0


class Recorder:
    """Keeps the states of a fraction of the running requests, and writes those that have ended in shards."""

    def __init__(
        self, folder: Path, fraction: float, model: str, hidden_size: int, limit: int, every: int, stop_tokens: Any
    ) -> None:
        self._folder = folder
        self._fraction = fraction
        self._every = every
        self._source = Source(model, hidden_size, every, limit, "live")
        self._stop_tokens = set(stop_tokens if isinstance(stop_tokens, list) else [stop_tokens]) - {None}
        self._running: dict[str, tuple[HookedRequest, Output]] = {}
        # Ended by their newest token; the scheduler may have begun another step with them.
        self._complete: set[str] = set()
        self._lock = threading.Lock()
        self._ended: list[Output] = []
        self._off = False
        threading.Thread(target=self._keep_writing, name="ares-recorder", daemon=True).start()

    def step(self, step: Step) -> None:
        """Process one step."""
        if self._off:
            return
        for request in step.finished:
            self._end(request)
            self._complete.discard(request.id)
        due = []
        for n, request in enumerate(step.requests):
            position = request.position + request.generated_before
            if request.position >= 0 and position % self._every == 0 and self._is_recorded(request):
                due.append((n, request, position))
        if due:
            states = half(step.states[[n for n, _, _ in due]].float().cpu().numpy())
            for state, (_, request, position) in zip(states, due, strict=True):
                if request.id not in self._running:
                    prompt = list(request.prompt_tokens[: len(request.prompt_tokens) - request.generated_before])
                    name = hashlib.sha256(np.array(prompt, np.int32).tobytes()).hexdigest()[:16]
                    self._running[request.id] = (request, Output(request.id, name, prompt))
                output = self._running[request.id][1]
                # A request that was preempted passes its earlier positions again.
                if np.isfinite(state).all() and (not output.positions or output.positions[-1] < position):
                    output.positions.append(position)
                    output.states.append(state)
        for request in step.requests:
            if request.id in self._running and self._has_ended(request):
                self._end(request)
                self._complete.add(request.id)

    def _has_ended(self, request: HookedRequest) -> bool:
        """Whether its newest token is its last; the scheduler reports that only in the next step, if there is one."""
        tokens = request.output_tokens
        return bool(tokens) and (tokens[-1] in self._stop_tokens_of(request) or len(tokens) >= self._limit_of(request))

    def _limit_of(self, request: HookedRequest) -> float:
        limit = getattr(request.sampling, "max_tokens", None)
        return math.inf if limit is None else limit

    def _stop_tokens_of(self, request: HookedRequest) -> set[int]:
        given = getattr(request.sampling, "stop_token_ids", None) or ()
        return set(given) if getattr(request.sampling, "ignore_eos", False) else self._stop_tokens | set(given)

    def _is_recorded(self, request: HookedRequest) -> bool:
        share = int.from_bytes(hashlib.sha256(request.id.encode()).digest()[:4], "big") / 2**32
        return share < self._fraction and not request.is_precopy and request.id not in self._complete

    def _end(self, request: HookedRequest) -> None:
        found = self._running.pop(request.id, None)
        if found is None:
            return
        output = found[1]
        tokens = list(request.prompt_tokens[len(request.prompt_tokens) - request.generated_before :])
        stop_tokens = self._stop_tokens_of(request)
        output.censored = True
        for number, token in enumerate(request.output_tokens):
            if number >= self._limit_of(request):  # accepted drafts beyond the limit, which vLLM dropped
                break
            tokens.append(token)
            if token in stop_tokens:  # what follows was in flight when vLLM saw the end
                output.censored = False
                break
        output.output_tokens = tokens
        # A cancelled output may end at a state that no token followed.
        while output.positions and output.positions[-1] >= len(tokens):
            output.positions.pop()
            output.states.pop()
        with self._lock:
            self._ended.append(output)
            full = len(self._ended) >= _SHARD_OUTPUTS
        if full:
            self._flush()

    def close(self) -> None:
        """Write all that is recorded; outputs that still run are censored here."""
        for request, _ in list(self._running.values()):
            self._end(request)
        self._flush()
        self._off = True

    def _keep_writing(self) -> None:
        """Write at an interval, also while nothing runs: vLLM kills its engine process without notice."""
        while not self._off:
            time.sleep(_SHARD_S)
            self._flush()

    def _flush(self) -> None:
        """Write the outputs that have ended; an error such as a full disk ends the recording, not the serving."""
        with self._lock:
            ended, self._ended = self._ended, []
        if self._off or not ended:
            return
        try:
            write(self._folder, self._source, ended)
        except PredictorError as error:
            logger.error("recording stops, serving continues: %s", error)
            self._off = True
            self._running = {}
