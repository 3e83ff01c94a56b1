"""A learner that is killed at any instant, and a second one on the same folder."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ares.learner import state
from ares.learner.errors import LearnerError
from ares.learner.folder import Folder
from ares.learner.learning import Learning
from ares.learner.settings import LearnerSettings
from tests.learner import synthetic
from tests.learner.fakes import Instance, serving
from tests.waiting import eventually


def start(folder: Path, url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ares", "predictor", "learn", "--worker", url, "--folder", str(folder)]
    command += ["--set", "take_s=0.02", "--set", "find_s=0.2", "--nice", "0"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


async def test_nothing_is_lost_where_it_is_killed(tmp_path: Path) -> None:
    instance = Instance(tmp_path)
    expected = set()
    for seed in range(300):
        made = synthetic.outputs(1, seed)
        expected |= {output.request for output in made}
        instance.offer(synthetic.shard(tmp_path, made))
    chance = random.Random(0)
    folder = Folder(tmp_path / "learner")
    async with serving(instance):
        for _ in range(2):
            process = start(folder.path, instance.url)
            left = instance.waiting
            await eventually(lambda left=left: instance.waiting < left - 5)
            await asyncio.sleep(chance.uniform(0, 0.05))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        process = start(folder.path, instance.url)
        await eventually(lambda: not instance.waiting)
        second = await asyncio.to_thread(lambda: start(folder.path, instance.url).communicate()[0])
        assert f"the learner with pid {process.pid} on" in second
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    with folder.locked():
        settings = LearnerSettings(folder=folder.path, workers=[instance.url])
        learning = Learning(folder, settings, {})
    assert set(learning.store.outputs) == expected
    assert all(len(output.pairs) == 1 for output in learning.store.outputs.values())  # none of them twice
    assert learning.store.number >= 300
    assert (found := state.read(folder.state)) is not None
    assert found.number == learning.store.number


def test_a_folder_that_cannot_be_used_is_a_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LearnerError, match="give another --folder"), Folder(path).locked():
            pass
