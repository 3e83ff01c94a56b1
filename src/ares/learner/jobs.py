"""Training and judging, each in a process of its own: `python -m ares.learner.jobs`, which imports torch.

The process reads its job from standard input as JSON, and writes lines of JSON to standard output: progress, and in the
end its result. It ends with the learner that started it.
"""

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ares.learner import trial

if TYPE_CHECKING:
    from ares.predictor.dataset import Pairs

_PR_SET_PDEATHSIG = 1
# The first trainings have few states: with large batches they would end after too few steps.
_FEW_PAIRS, _SMALL_BATCH, _BATCH = 20_000, 64, 256


class Train(msgspec.Struct, tag="train", kw_only=True):
    """Train on these outputs of these shards, and write the checkpoint."""

    files: list[str]
    requests: list[str]
    checkpoint: str
    seed: int
    epochs: int
    threads: int
    nice: int


class Judge(msgspec.Struct, tag="judge", kw_only=True):
    """Compute the losses of checkpoints, and of the curve, on these outputs of these shards.

    Attributes
    ----------
    began
        The arrival number of the first piece of each output.
    checkpoints
        By their roles in the trial.
    lengths
        Outputs from which the curve is made: the arrival number at which each had ended (0 for one that the curve knows
        from the beginning), its length, and whether it was cut.
    """

    files: list[str]
    requests: list[str]
    began: list[int]
    checkpoints: dict[str, str]
    lengths: list[tuple[int, int, bool]]
    threads: int
    nice: int


class Progress(msgspec.Struct, tag="progress"):
    """An epoch of a training has ended."""

    epoch: int
    validation_crps: float


class Trained(msgspec.Struct, tag="trained"):
    """A training's end: the states that it had, and the validation loss of its best epoch."""

    pairs: int
    epochs: int
    validation_crps: float


class Judged(msgspec.Struct, tag="judged"):
    """A judging's end, in order of the outputs."""

    scored: list[trial.Scored]


class Failed(msgspec.Struct, tag="failed"):
    """A job's end: why there is no result."""

    text: str


Job = Train | Judge
Reply = Progress | Trained | Judged | Failed


def main() -> None:
    """Run one job."""
    _keep_replies_apart()
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    _end_with_parent(int(sys.argv[1]))
    os.setpriority(os.PRIO_PROCESS, 0, max(job.nice, os.getpriority(os.PRIO_PROCESS, 0)))
    import torch

    from ares.predictor.errors import PredictorError

    torch.set_num_threads(job.threads)
    try:
        _write(_train(job) if isinstance(job, Train) else _judge(job))
    except (PredictorError, OSError, MemoryError) as error:
        _write(Failed(str(error) or type(error).__name__))


def _train(job: Train) -> Trained:
    from ares.predictor import checkpoint
    from ares.predictor.training import TrainingSettings, train

    pairs = _load(job.files, job.requests)
    settings = TrainingSettings(
        seed=job.seed, epochs=job.epochs, batch=_BATCH if len(pairs) > _FEW_PAIRS else _SMALL_BATCH
    )

    def on_epoch(entry: dict[str, float]) -> None:
        _write(Progress(int(entry["epoch"]) + 1, entry["validation_crps"]))

    trained, report = train(pairs, settings, on_epoch)
    checkpoint.save(Path(job.checkpoint), trained)
    return Trained(len(pairs), len(report["curve"]), report["best"]["validation_crps"])


def _judge(job: Judge) -> Judged:
    import numpy as np

    from ares.predictor import checkpoint, metrics
    from ares.predictor.training import Data, predict

    pairs = _load(job.files, job.requests)
    remaining, room = pairs.remaining.astype(float), pairs.room.astype(float)
    losses = {trial.CURVE: 2 * metrics.pinball(metrics.bounded(_curve(job, pairs), room), remaining)}
    for role, path in job.checkpoints.items():
        loaded = checkpoint.load(Path(path))
        data = Data.of(pairs, loaded.center, loaded.scale, loaded.network.first)
        losses[role] = 2 * metrics.pinball(predict(loaded.network, data), remaining)
    outputs = len(pairs.requests)
    counts = np.bincount(pairs.output, minlength=outputs)
    sums = {role: np.bincount(pairs.output, loss, outputs) for role, loss in losses.items()}
    by_request = {
        pairs.requests[n]: trial.Scored(
            pairs.prompts[n], int(pairs.lengths[n]), int(counts[n]), {role: float(s[n]) for role, s in sums.items()}
        )
        for n in np.flatnonzero(counts)
    }
    return Judged([by_request[request] for request in job.requests if request in by_request])


def _curve(job: Judge, pairs: "Pairs") -> Any:
    """Return [pairs, levels]: what a gateway forecasts without a predictor, by its own code.

    Of each output it knows the lengths of those that had ended before it began.
    """
    import numpy as np

    from ares.gateway.control.lengths import LengthHistory
    from ares.predictor.hazard import LEVELS

    history, ended = LengthHistory(), deque(sorted(job.lengths))
    rows = {request: n for n, request in enumerate(pairs.requests)}
    result = np.empty((len(pairs), len(LEVELS)))
    for began, request in sorted(zip(job.began, job.requests, strict=True)):
        while ended and ended[0][0] < began:
            _, length, was_cut = ended.popleft()
            if length:
                history.add(length, was_cut=was_cut)
        for pair in np.flatnonzero(pairs.output == rows.get(request, -1)):
            history.expect(int(pairs.position[pair]), None, LEVELS, result[pair])
    return np.maximum(result, 1.0)


def _load(files: Sequence[str], requests: Sequence[str]) -> "Pairs":
    """Return the pairs of these outputs; those of other outputs in the shards are left out."""
    import numpy as np

    from ares.predictor import dataset

    pairs = dataset.load_files([Path(file) for file in files])
    wanted = set(requests)
    chosen = np.array([request in wanted for request in pairs.requests], bool)
    return pairs.only(chosen[pairs.output])


def _end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the learner ends, also where it is killed itself."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before that call
        sys.exit(1)


def _keep_replies_apart() -> None:
    """Let what libraries print go to standard error, away from the replies."""
    replies = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(replies, "w")


def _write(reply: Reply) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(reply) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
