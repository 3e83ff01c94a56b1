"""Checkpoints that arrive in parts."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ares.engine.learning.checkpoint_receiver import CheckpointReceiver
from ares.engine.learning.folder import LearningFolder
from ares.protocol import messages

DATA = bytes(range(250))
VERSION = hashlib.sha256(DATA).hexdigest()


class Bench:
    def __init__(self, path: Path) -> None:
        self.folder = LearningFolder(path)
        self.folder.prepare()
        self.receiver = CheckpointReceiver(self.folder)

    def send(
        self, offset: int, data: bytes, *, version: str = VERSION, size: int = len(DATA)
    ) -> messages.CheckpointReceived:
        return self.receiver.receive(messages.CheckpointPart(1, "learner", version, offset, size, data))

    def send_all(self, data: bytes = DATA, version: str = VERSION) -> list[str]:
        """Send all parts; return what was refused."""
        parts = ((n, data[n : n + 100]) for n in range(0, len(data), 100))
        answers = (self.send(n, part, version=version, size=len(data)) for n, part in parts)
        return [answer.refused for answer in answers if answer.refused]

    @property
    def ordered(self) -> str | None:
        wanted = self.folder.wanted()
        return wanted.version if wanted is not None else None


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    return Bench(tmp_path)


def test_a_whole_checkpoint_is_ordered(bench: Bench) -> None:
    assert [bench.send(n, DATA[n : n + 100]).received for n in (0, 100)] == [100, 200]
    assert bench.ordered is None
    assert bench.send(200, DATA[200:]).received == 250
    assert bench.ordered == VERSION
    assert bench.folder.incoming(VERSION).read_bytes() == DATA
    assert not bench.folder.unfinished.exists()


def test_the_same_version_again_is_a_new_order(bench: Bench) -> None:
    bench.send_all()
    first = bench.folder.wanted()
    bench.send_all()
    second = bench.folder.wanted()
    assert first is not None
    assert second is not None
    assert first.order != second.order


def test_a_newer_one_replaces_one_that_waits(bench: Bench) -> None:
    bench.send_all()
    other = DATA[::-1]
    bench.send_all(other, hashlib.sha256(other).hexdigest())
    assert bench.ordered == hashlib.sha256(other).hexdigest()
    assert not bench.folder.incoming(VERSION).exists()


def test_a_part_that_comes_twice_changes_nothing(bench: Bench) -> None:
    bench.send(0, DATA[:100])
    bench.send(100, DATA[100:200])
    again = bench.send(100, DATA[100:200])
    assert (again.received, again.refused) == (200, "")
    bench.send(200, DATA[200:])
    assert bench.ordered == VERSION


def test_offset_0_begins_anew(bench: Bench) -> None:
    bench.send(0, b"x" * 100)
    assert bench.send_all() == []
    assert bench.ordered == VERSION


@pytest.mark.parametrize(
    ("offset", "data", "size", "version", "reason"),
    [
        (150, b"later", 250, VERSION, "without those before them"),
        (100, b"other size", 300, VERSION, "without those before them"),
        (100, b"other version", 250, "0" * 64, "without those before them"),
        (50, bytes(100), 250, VERSION, "some are here already"),
        (100, bytes(151), 250, VERSION, "bytes 100 to 251 of a checkpoint of 250 bytes"),
        (0, b"", 0, VERSION, "of a checkpoint of 0 bytes"),
        (0, b"data", 4, "", "without a version"),
    ],
)
def test_what_does_not_follow_is_refused(
    bench: Bench, offset: int, data: bytes, size: int, version: str, reason: str
) -> None:
    bench.send(0, DATA[:100])
    answer = bench.send(offset, data, size=size, version=version)
    assert reason in answer.refused
    assert answer.received == 0
    # It has to begin again.
    assert "send it from the beginning" in bench.send(100, DATA[100:200]).refused
    assert bench.ordered is None
    assert bench.send_all() == []
    assert bench.ordered == VERSION


def test_another_hash_is_refused(bench: Bench) -> None:
    (reason,) = bench.send_all(DATA[:-1] + b"?")
    assert "SHA-256" in reason
    assert bench.ordered is None
    assert not list(bench.folder.path.glob("incoming*"))


def test_an_empty_version_ends_predictions(bench: Bench) -> None:
    assert bench.send(0, b"", version="", size=0).refused == ""
    assert bench.ordered == ""


def test_a_folder_that_has_gone_is_a_reason(bench: Bench) -> None:
    bench.folder.recorded.rmdir()
    bench.folder.path.rmdir()
    assert "cannot be stored" in bench.send(0, DATA[:100]).refused
