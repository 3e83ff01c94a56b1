"""Jobs in their processes: their results, their failures, and their end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ares.gateway.control.lengths import LengthHistory
from ares.gateway.tuning import DEFAULT
from ares.learner import jobs, running_job
from ares.predictor import checkpoint
from ares.predictor.hazard import LEVELS
from tests.learner import synthetic
from tests.learner.job_processes import children


def shards(folder: Path, count: int, seed: int) -> tuple[list[str], list[str]]:
    """Files of shards, and the requests in them."""
    files, requests = [], []
    made = synthetic.outputs(count, seed)
    for first in range(0, count, 50):
        part = made[first : first + 50]
        path = folder / f"{seed}-{first}.safetensors"
        path.write_bytes(synthetic.shard(folder, part))
        files.append(str(path))
        requests += [output.request for output in part]
    return files, requests


def train(folder: Path, files: list[str], requests: list[str], epochs: int = 3) -> jobs.Train:
    target = str(folder / "made.safetensors")
    return jobs.Train(files=files, requests=requests, checkpoint=target, seed=0, epochs=epochs, threads=1, nice=0)


async def test_a_training_and_a_judging(tmp_path: Path) -> None:
    files, requests = shards(tmp_path, 100, seed=1)
    epochs: list[int] = []
    job = train(tmp_path, files, requests[:90])
    result = await running_job.run(job, 200, lambda progress: epochs.append(progress.epoch))
    assert isinstance(result, jobs.Trained)
    assert epochs == [1, 2, 3]
    loaded = checkpoint.load(Path(job.checkpoint))
    assert (loaded.model, loaded.hidden_size) == (synthetic.MODEL, synthetic.HIDDEN)
    roles = {"challenger": job.checkpoint}
    judge = jobs.Judge(
        files=files,
        requests=requests[90:],
        began=[2] * 10,
        checkpoints=roles,
        lengths=[(1, 60, False), (1, 300, True)],
        threads=1,
        nice=0,
    )
    judged = await running_job.run(judge, 200, lambda _: None)
    assert isinstance(judged, jobs.Judged)
    assert [f"gateway/{one.prompt.removeprefix('prompt-')}" for one in judged.scored] == requests[90:]
    for one in judged.scored:
        assert one.losses.keys() == {"curve", "challenger"}
        assert one.pairs == len(range(0, one.length, synthetic.EVERY))
        assert 0 < one.losses["challenger"] < synthetic.CONTEXT * one.pairs


@pytest.mark.parametrize("cut", [False, True])
async def test_the_curve_is_what_a_gateway_forecasts_without_a_predictor(tmp_path: Path, cut: bool) -> None:
    # Only then are requests told apart by nothing, as here.
    assert not DEFAULT.length_curves
    files, requests = shards(tmp_path, 100, seed=1)
    lengths = [(1 + n // 40, 20 + 3 * n, cut and n % 7 == 0) for n in range(80)]
    judge = jobs.Judge(
        files=files,
        requests=requests[:2],
        began=[2, 3],
        checkpoints={},
        lengths=[*lengths, (3, 1000, False)],
        threads=1,
        nice=0,
    )
    judged = await running_job.run(judge, 200, lambda _: None)
    assert isinstance(judged, jobs.Judged)
    for one, known in zip(judged.scored, (40, 80), strict=True):
        history = LengthHistory()
        for _, length, was_cut in lengths[:known]:
            history.add(length, was_cut=was_cut)
        expected, forecast = 0.0, np.empty(len(LEVELS))
        for position in range(0, one.length, synthetic.EVERY):
            history.expect(position, None, LEVELS, forecast)
            remaining = one.length - position
            error = remaining - np.clip(forecast, 1, synthetic.CONTEXT - 3 - position)
            expected += 2 * float(np.maximum(np.array(LEVELS) * error, (np.array(LEVELS) - 1) * error).mean())
        assert one.losses["curve"] == pytest.approx(expected)


async def test_why_a_job_failed(tmp_path: Path) -> None:
    _, requests = shards(tmp_path, 20, seed=1)
    with pytest.raises(running_job.JobError, match="not a whole shard"):
        await running_job.run(train(tmp_path, [str(tmp_path / "gone.safetensors")], requests), 200, lambda _: None)


async def test_a_job_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    files, requests = shards(tmp_path, 20, seed=1)
    with pytest.raises(running_job.JobError, match="longer than 0 s"):
        await running_job.run(train(tmp_path, files, requests), 0.2, lambda _: None)
    assert not children()


async def test_a_job_that_is_killed_says_so(tmp_path: Path) -> None:
    files, requests = shards(tmp_path, 100, seed=1)

    def kill(_: jobs.Progress) -> None:
        os.kill(children()[0], signal.SIGKILL)

    with pytest.raises(running_job.JobError, match="killed by signal 9"):
        await running_job.run(train(tmp_path, files, requests, epochs=1000), 200, kill)


def test_a_job_ends_with_its_parent(tmp_path: Path) -> None:
    """Its parent is another process than the one that it is given, as where that one has ended already."""
    files, requests = shards(tmp_path, 20, seed=1)
    body = msgspec.json.encode(train(tmp_path, files, requests))
    command = [sys.executable, "-m", "ares.learner.jobs", str(os.getppid())]
    done = subprocess.run(command, input=body, capture_output=True, check=False, timeout=100)
    assert (done.returncode, done.stdout) == (1, b"")
