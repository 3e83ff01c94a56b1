"""What a learner gets and what it may delete."""

from pathlib import Path

import pytest

from ares.engine.learning.recorded_shards import RecordedShards
from ares.protocol import messages, rpc

NAMES = [f"part-{number:012d}-0123abcd.safetensors" for number in (1, 2, 10)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "recorded"
    made.mkdir()
    for name in NAMES:
        (made / name).write_bytes(name.encode())
    return made


def take(folder: Path, *stored: str) -> messages.Recorded:
    return RecordedShards(folder).take(messages.TakeRecorded(7, "learner", list(stored)))


def test_the_oldest_comes_first_until_it_is_stored(folder: Path) -> None:
    for _ in range(2):
        assert take(folder) == messages.Recorded(7, NAMES[0], NAMES[0].encode(), 2)
    assert take(folder, NAMES[0]) == messages.Recorded(7, NAMES[1], NAMES[1].encode(), 1)
    assert not (folder / NAMES[0]).exists()
    assert take(folder, *NAMES) == messages.Recorded(7)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["../predictor.safetensors", "notes.txt", "", ".", "..", "/etc/hostname"])
def test_nothing_else_is_deleted_or_sent(folder: Path, name: str) -> None:
    (folder.parent / "predictor.safetensors").write_text("kept")
    (folder / "notes.txt").write_text("kept")
    assert take(folder, name).name == NAMES[0]
    assert (folder.parent / "predictor.safetensors").read_text() == "kept"
    assert (folder / "notes.txt").read_text() == "kept"
    assert take(folder, name, *NAMES).name == ""


def test_a_shard_that_fits_no_message_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / NAMES[0]).write_bytes(bytes(rpc.MAX_MESSAGE_BYTES))
    reader = RecordedShards(folder)
    for _ in range(2):
        taken = reader.take(messages.TakeRecorded(1, "learner"))
        assert (taken.name, taken.left) == (NAMES[1], 1)
    assert sum("larger than a message" in message for message in caplog.messages) == 1
    (folder / NAMES[0]).write_bytes(bytes(2 << 20))
    assert len(rpc.encode(reader.take(messages.TakeRecorded(1, "learner")))) < rpc.MAX_MESSAGE_BYTES


def test_no_folder_is_no_shard(tmp_path: Path) -> None:
    assert take(tmp_path / "missing") == messages.Recorded(7)


def test_what_cannot_be_deleted_is_not_handed_over_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reader = RecordedShards(folder)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "unlink", read_only)
        taken: list[str] = []
        while name := reader.take(messages.TakeRecorded(1, "learner", taken[-1:])).name:
            taken.append(name)
            assert taken == NAMES[: len(taken)]
    assert sum("Read-only" in message for message in caplog.messages) == 1
    assert reader.take(messages.TakeRecorded(1, "learner")).name == ""
    assert not list(folder.iterdir())
