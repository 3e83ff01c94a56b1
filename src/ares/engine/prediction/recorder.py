"""Records hidden states of live requests as training data: their own outputs are the labels.

Outputs are written in pieces (`predictor/shards.py`): the first soon after the output has begun, then one every half
minute, and the last soon after its end. So a learner gets the first pieces in the order in which the outputs began,
however long they are.
"""

import hashlib
import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ares.engine.prediction.hidden_states import HookedRequest, Step
from ares.engine.prediction.recording_sample import Sample
from ares.engine.prediction.shard_sizes import shards_of
from ares.engine.prediction.state_copies import StateCopies
from ares.predictor.errors import PredictorError
from ares.predictor.shards import Outcome, Output, Source, write

logger = logging.getLogger(__name__)

# So many pieces are written at once.
_MOST_PIECES = 64


@dataclass(frozen=True, slots=True)
class Intervals:
    """Seconds between two writes.

    Attributes
    ----------
    ended_s, running_s
        Between two writes of what has ended, and between two pieces of an output that runs.
    pause_s
        For how long nothing is recorded after a write that failed.
    """

    ended_s: float = 10.0
    running_s: float = 30.0
    pause_s: float = 60.0


class Store(Protocol):
    """Where the shards go."""

    def write(self, source: Source, outputs: Sequence[Output], *, token_ids: bool) -> None:
        """Write a shard; PredictorError where that fails."""

    def trim(self) -> None:
        """Keep what is stored within its bounds; PredictorError where that fails."""


class DataFolder:
    """A data folder for `ares predictor train`, without bounds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, source: Source, outputs: Sequence[Output], *, token_ids: bool) -> None:
        """Write a shard; PredictorError where that fails."""
        write(self._folder, source, outputs, token_ids=token_ids)

    def trim(self) -> None:
        """Do nothing: it has no bounds."""


@dataclass(slots=True)
class _Recording:
    """A request that is being recorded: the states of its next piece, and the newest position so far.

    `limit` is how many tokens it may generate here, and `stop_tokens` are those that end it. `number` counts the
    recordings, and `has_piece` is whether a piece has been made.
    """

    request: HookedRequest
    name: str
    limit: int
    stop_tokens: frozenset[int]
    number: int
    newest: int = -1
    has_piece: bool = False
    positions: list[int] = field(default_factory=list)
    states: list[NDArray[np.float16]] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        """Whether its newest token is its last; the scheduler reports that only in the next step, if there is one."""
        tokens = self.request.output_tokens
        return bool(tokens) and (tokens[-1] in self.stop_tokens or len(tokens) >= self.limit)

    def tokens(self) -> tuple[list[int], Outcome | None]:
        """Return the tokens of the whole output so far, and how it ended if they say so."""
        before = list(self.request.prompt_tokens[_prompt_length(self.request) :])
        # Beyond the limit there may be accepted drafts, which vLLM has dropped.
        tokens = self.request.output_tokens[: self.limit]
        if not self.stop_tokens.isdisjoint(tokens):
            # What follows was in flight when vLLM saw the end.
            end = next(n for n, token in enumerate(tokens, 1) if token in self.stop_tokens)
            return before + tokens[:end], Outcome.STOP
        # A request that is only prefilled here ends by its limit, but its output does not.
        limited = len(tokens) == self.limit and not self.request.prefill_only
        return before + tokens, Outcome.LIMIT if limited else None


@dataclass(frozen=True, slots=True)
class _Row:
    """A state on its way to the host: whose it is, and how many tokens were generated before it."""

    recording: _Recording
    position: int


class Recorder:
    """Keeps the states of some of the running requests, and writes them in shards.

    `step` runs on the thread of the model and waits neither for the disk nor for a GPU; everything else runs on a
    thread of its own. A write that fails, such as on a full disk, pauses the recording.

    Parameters
    ----------
    store
        Where the shards go.
    sample
        Chooses the requests.
    source
        The model, the tokens between two states (`every`), and the longest context (`limit`).
    token_ids
        Whether token ids are recorded.
    intervals
        When what is recorded is written.
    """

    def __init__(
        self, store: Store, sample: Sample, source: Source, *, token_ids: bool, intervals: Intervals | None = None
    ) -> None:
        self._intervals = intervals or Intervals()
        self._store = store
        self._sample = sample
        self._source = source
        self._token_ids = token_ids
        # By vLLM's id: every request since it arrived; None for those that are not recorded, or not any more.
        self._recordings: dict[str, _Recording | None] = {}
        self._copies: StateCopies[list[_Row]] = StateCopies()
        # Recordings that end as soon as so many copies have arrived.
        self._ending: list[tuple[int, _Recording]] = []
        self._count = 0
        self._pieces: list[tuple[_Recording, Output]] = []
        self._pieces_due = time.monotonic() + self._intervals.running_s
        self._paused_until = -math.inf
        self._failing = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._writing = threading.Lock()
        threading.Thread(target=self._keep_writing, name="ares-recorder", daemon=True).start()

    def step(self, step: Step) -> None:
        """Process one step."""
        with self._lock:
            self._arrive()
            for request in step.finished:
                if (recording := self._recordings.pop(request.id, None)) is not None:
                    self._end(recording)
            due: list[tuple[int, _Row]] = []
            running = []
            for n, request in enumerate(step.requests):
                if request.position < 0:
                    continue
                if request.id not in self._recordings:
                    self._recordings[request.id] = self._begin(request)
                if (recording := self._recordings[request.id]) is None:
                    continue
                running.append(recording)
                position = request.position + request.generated_before
                if position % self._source.every == 0:
                    due.append((n, _Row(recording, position)))
            if due:
                self._copies.send(step.states, [n for n, _ in due], [row for _, row in due])
                self._arrive()
            for recording in running:
                if recording.has_ended:
                    self._recordings[recording.request.id] = None  # the scheduler may have begun another step with it
                    self._end(recording)

    def _begin(self, request: HookedRequest) -> _Recording | None:
        """Return a recording of a request that arrives; None where it is not recorded."""
        name = name_of(request)
        if request.is_precopy or time.monotonic() < self._paused_until or not self._sample.takes(name):
            return None
        self._count += 1
        return _Recording(request, name, self._limit_of(request), _stop_tokens_of(request), self._count)

    def _arrive(self, *, wait: bool = False) -> None:
        """Take the states that have reached the host."""
        for states, rows in self._copies.take(wait=wait):
            for state, row in zip(states, rows, strict=True):
                recording = row.recording
                # A request that was preempted passes its earlier positions again.
                if recording.newest < row.position and np.isfinite(state).all():
                    recording.newest = row.position
                    recording.positions.append(row.position)
                    recording.states.append(state)
        waiting, self._ending = self._ending, []
        for copies, recording in waiting:
            self._end(recording, copies)

    def _end(self, recording: _Recording, copies: int | None = None) -> None:
        """Make the last piece of a recording, once its states are on the host."""
        copies = self._copies.sent if copies is None else copies
        if copies > self._copies.arrived:
            self._ending.append((copies, recording))
            return
        self._sample.release(prefill_only=recording.request.prefill_only)
        self._cut(recording, Outcome.LEFT)
        if len(self._pieces) >= _MOST_PIECES:
            self._wake.set()

    def _cut(self, recording: _Recording, otherwise: Outcome) -> None:
        """Make a piece of a recording; `otherwise` is its outcome where its tokens do not say that it has ended."""
        request = recording.request
        tokens, outcome = recording.tokens()
        outcome = outcome or otherwise
        # A state whose token is not on the host yet, which there may never be.
        count = sum(position < len(tokens) for position in recording.positions)
        if outcome is Outcome.RUNNING and not count and recording.has_piece:
            return
        recording.has_piece = True
        piece = Output(
            recording.name,
            prompt="",  # with the prompt's tokens, by the thread that writes
            prompt_tokens=(),
            output_tokens=tokens,
            positions=recording.positions[:count],
            states=recording.states[:count],
            outcome=outcome,
            limit=0 if request.prefill_only else request.generated_before + recording.limit,
        )
        self._pieces.append((recording, piece))
        recording.positions, recording.states = recording.positions[count:], recording.states[count:]

    def _limit_of(self, request: HookedRequest) -> int:
        """Return how many tokens it may generate here (v1/core/sched/utils.py:check_stop, vLLM 0.32)."""
        given = getattr(request.sampling, "max_tokens", None)
        room = max(1, self._source.limit - len(request.prompt_tokens))
        return room if given is None else min(given - request.resumed, room)

    def close(self) -> None:
        """Write all that is recorded; outputs that still run have left this instance."""
        with self._lock:
            self._closed = True
            self._arrive(wait=True)
            for recording in self._recordings.values():
                if recording is not None:
                    self._end(recording)
            self._recordings = {}
        self._wake.set()
        self._write()

    def _keep_writing(self) -> None:
        """Write at an interval, also while nothing runs: vLLM kills its engine process without notice."""
        while not self._closed:
            self._wake.wait(self._intervals.ended_s)
            self._wake.clear()
            try:
                self._cut_running()
                self._write()
            except Exception:
                logger.exception("recording failed and is off; serving continues")
                self._drop(math.inf)
                return

    def _cut_running(self) -> None:
        """Make pieces of the outputs that run: of those that have none, and of all if they are due."""
        with self._lock:
            self._arrive()
            now = time.monotonic()
            if self._closed:
                return
            if all_due := now >= self._pieces_due:
                self._pieces_due = now + self._intervals.running_s
            recordings = (recording for recording in self._recordings.values() if recording is not None)
            running = [recording for recording in recordings if all_due or not recording.has_piece]
        for recording in running:  # one after the other: a step waits for the lock
            with self._lock:
                if self._recordings.get(recording.request.id) is recording:
                    self._cut(recording, Outcome.RUNNING)

    def _write(self) -> None:
        """Write the pieces that were made; an error such as a full disk pauses the recording, not the serving."""
        with self._writing:
            with self._lock:
                pieces, self._pieces = self._pieces, []
            pieces.sort(key=lambda piece: piece[0].number)
            outputs = [_with_prompt(piece, recording.request) for recording, piece in pieces]
            try:
                for shard, token_ids in shards_of(outputs, self._source, token_ids=self._token_ids):
                    self._store.write(self._source, shard, token_ids=token_ids)
                self._store.trim()
            except PredictorError as error:
                if not self._failing:
                    logger.error("recording pauses, serving continues; it is tried again every minute: %s", error)
                self._failing = True
                self._drop(time.monotonic() + self._intervals.pause_s)
                return
        if pieces and self._failing:
            logger.info("recording continues")
            self._failing = False

    def _drop(self, until: float) -> None:
        """Drop all recordings, and take none before `until`."""
        with self._lock:
            self._paused_until = until
            for recording in [*self._recordings.values(), *(recording for _, recording in self._ending)]:
                if recording is not None:
                    self._sample.release(prefill_only=recording.request.prefill_only)
            self._recordings = dict.fromkeys(self._recordings)
            self._ending = []
            self._pieces = []


def name_of(request: HookedRequest) -> str:
    """Return the id of a request's output: the same on every instance, where it comes from a gateway.

    A gateway's keys are its name, a random part for the output, and a number for each of the requests that it makes of
    it, with slashes between them (gateway/session/placement.py).
    """
    key = request.key
    return key.rpartition("/")[0] if key is not None and key.count("/") >= 2 else request.id


def _prompt_length(request: HookedRequest) -> int:
    return len(request.prompt_tokens) - request.generated_before


def _stop_tokens_of(request: HookedRequest) -> frozenset[int]:
    """Return the tokens that end an output (v1/core/sched/utils.py:check_stop, vLLM 0.32)."""
    given = getattr(request.sampling, "stop_token_ids", None) or ()
    end = getattr(request.sampling, "eos_token_id", None)
    return frozenset(given if end is None else (*given, end))


def _with_prompt(piece: Output, request: HookedRequest) -> Output:
    prompt = list(request.prompt_tokens[: _prompt_length(request)])
    name = hashlib.sha256(np.array(prompt, np.int32).tobytes()).hexdigest()[:16]
    return replace(piece, prompt=name, prompt_tokens=prompt)
