"""One learner at a time."""

import hashlib
from pathlib import Path

import pytest

from ares.engine.learning.folder import LearningFolder
from ares.engine.learning.owner import LEASE_S
from ares.engine.learning.service import LearningService
from ares.protocol import messages

NAME = "part-000000000001-0123abcd.safetensors"
DATA = b"a checkpoint"
VERSION = hashlib.sha256(DATA).hexdigest()


class Bench:
    """The service of an instance with one recorded shard, and a clock."""

    def __init__(self, path: Path) -> None:
        self.now = 0.0
        self.folder = LearningFolder(path)
        self.folder.prepare()
        (self.folder.recorded / NAME).write_bytes(b"states")
        self.restart()

    def restart(self) -> None:
        self.service = LearningService(self.folder, "", lambda: self.now)

    def take(self, learner: str, *stored: str) -> messages.Recorded:
        answer = self.service.answer(messages.TakeRecorded(1, learner, list(stored)))
        assert isinstance(answer, messages.Recorded)
        return answer

    def send(self, learner: str) -> str:
        answer = self.service.answer(messages.CheckpointPart(1, learner, VERSION, 0, len(DATA), DATA))
        assert isinstance(answer, messages.CheckpointReceived)
        return answer.refused


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_another_learner_gets_nothing_and_deletes_nothing(bench: Bench) -> None:
    assert bench.take("one").name == NAME
    refused = bench.take("two", NAME)
    assert (refused.name, refused.data) == ("", b"")
    assert "belongs to learner one: stop one of the two" in refused.refused
    assert (bench.folder.recorded / NAME).exists()
    assert "belongs to learner one" in bench.send("two")
    assert bench.folder.wanted() is None
    assert not bench.send("one")
    assert bench.folder.wanted() is not None


def test_whoever_asks_keeps_it_and_one_that_is_silent_loses_it(bench: Bench) -> None:
    bench.take("one")
    for _ in range(3):
        bench.now += LEASE_S - 1
        assert bench.take("two").refused
        assert not bench.take("one").refused
    bench.now += LEASE_S
    assert bench.take("two").name == NAME
    assert bench.take("one").refused


def test_a_restart_changes_nothing(bench: Bench) -> None:
    bench.take("one")
    bench.restart()
    assert bench.take("two").refused
    assert not bench.take("one").refused
    bench.restart()
    bench.now += LEASE_S
    assert not bench.take("two").refused


def test_without_a_place_for_its_name_it_still_has_one_owner(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    (bench.folder.path / "owner.json").mkdir()
    assert bench.take("one").name == NAME
    assert bench.take("two").refused
    assert "after a restart any learner may take this instance" in caplog.text
