"""The learner's folder: its lock, its files, and what a kill or a full disk leaves."""

import json
import math
import os
import resource
import signal
from pathlib import Path

import msgspec
import pytest

from ares.learner import files, state
from ares.learner.errors import LearnerError
from ares.learner.folder import Folder, LockedError
from ares.learner.history import KEPT, History, read
from ares.learner.shipped import by_version, ships_for
from ares.learner.versions import DamagedError, Status, Version, Versions, hash_of
from ares.models.resolve import DEFAULT_MODEL
from ares.predictor.errors import PredictorError


def test_the_lock_names_its_holder_and_is_free_afterwards(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "learner")
    assert folder.holder() is None
    with folder.locked():
        assert f"pid {os.getpid()} on" in (folder.holder() or "")
        with pytest.raises(LockedError, match=f"pid {os.getpid()} on"), folder.locked():
            pass
    assert folder.holder() is None
    assert folder.path.stat().st_mode & 0o077 == 0
    with folder.locked():
        pass


def test_half_written_files_are_deleted(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.prepare()
    (folder.recorded / ".000000000001-a.safetensors.unfinished").write_bytes(b"half")
    folder.prepare()
    assert not list(folder.recorded.iterdir())


def test_a_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    files.write_whole(path, b"before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "recorded").write_text("in the way")
    with pytest.raises(LearnerError, match="cannot be written"):
        Folder(tmp_path).prepare()


@pytest.mark.parametrize("name", ["recorded", "versions", "commands"])
def test_a_part_of_the_folder_that_cannot_be_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch = Path.touch

    def read_only(path: Path) -> None:  # a mode would not keep root out
        if path.parent.name == name:
            raise OSError(30, "Read-only file system", str(path))
        touch(path)

    monkeypatch.setattr(Path, "touch", read_only)
    with pytest.raises(LearnerError, match=f"/{name}/.*: cannot be written: Read-only"):
        Folder(tmp_path).prepare()


# --- state ---


def test_the_state_is_read_back(tmp_path: Path) -> None:
    before = state.State(model="m", number=7, champion="ab", challenger="cd", looks=2, frozen=True)
    state.write(tmp_path / "state.json", before)
    assert state.read(tmp_path / "state.json") == before
    assert state.read(tmp_path / "none.json") is None


@pytest.mark.parametrize("content", [b"", b"{", b'{"number": "seven"}', b"\xff\xfe"])
def test_an_unreadable_state_is_kept_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    assert state.read(path) is None
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith("state.json.unreadable-")
    assert aside.read_bytes() == content


def test_falling_back_goes_through_the_champions_before() -> None:
    found = state.State()
    for version in ("a", "b", "c"):
        found.crown(version)
    assert found.fall_back({"a"}) == "a"  # b is gone
    assert found.fall_back({"a"}) == state.CURVE
    assert found.fall_back({"a"}) == state.CURVE
    assert found.decided


# --- history ---


def test_events_survive_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.add("trained", "first", "ab" * 32, outputs=3)
    history.flush()
    with path.open("ab") as file:
        file.write(b'{"time": 1, "event": "promo')
    history = History(path)
    history.add("promoted", "second", "ab" * 32)
    history.flush()
    history.add("frozen", "third")
    assert [event["text"] for event in read(path)] == ["first", "second"]
    history.flush()
    assert [event["text"] for event in read(path)] == ["first", "second", "third"]
    assert read(path)[0]["outputs"] == 3
    assert b"\n\n" not in path.read_bytes()


def test_the_history_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    for number in range(2 * KEPT + 10):
        history.add("error", str(number))
        if number % 50 == 0:
            history.flush()
    history.flush()
    assert [event["text"] for event in read(path)] == [str(n) for n in range(KEPT + 10, 2 * KEPT + 10)]
    assert len(path.read_bytes().splitlines()) <= 2 * KEPT


def test_the_history_is_bounded_across_restarts(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    for _ in range(5):
        history = History(path)
        for number in range(KEPT - 100):
            history.add("error", str(number))
        history.flush()
        assert len(path.read_bytes().splitlines()) <= 2 * KEPT


def test_a_full_disk_repeats_no_event(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.add("frozen", "before")
    history.flush()
    for number in range(60):
        history.add("error", str(number))
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 1500, limits[1]))
        for _ in range(3):
            with pytest.raises(OSError, match="File too large"):
                history.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [event["text"] for event in read(path)] == ["before"]
    history.flush()
    assert [event["text"] for event in read(path)] == ["before", *map(str, range(60))]
    assert len(path.read_bytes().splitlines()) == 61


@pytest.mark.parametrize(
    "field",
    [
        {"time": "x"},
        {"time": 1e30},
        {"time": -5},
        {"event": "Foo bar"},
        {"text": 3},
        {"version": "zz"},
        {"loss": 1e400},
    ],
)
def test_what_is_no_event_is_left_out(
    tmp_path: Path, field: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.add("promoted", "kept", loss=math.nan)
    history.flush()
    with path.open("a") as file:
        file.write(json.dumps({"time": 1.0, "event": "promoted", "version": "", "text": "x"} | field) + "\n[3]\n")
    assert [(event["text"], event["loss"]) for event in read(path)] == [("kept", None)]
    assert "2 lines are no whole events" in caplog.text


# --- versions ---


def stored(versions: Versions, folder: Path, content: bytes, **fields: object) -> str:
    path = folder / ".made.unfinished"
    path.write_bytes(content)
    version = hash_of(path)
    versions.add(path, Version(version=version, model="m", hidden_size=4, **fields))  # type: ignore[arg-type]
    return version


def test_versions_are_read_back_in_order_of_their_changes(tmp_path: Path) -> None:
    versions = Versions(tmp_path, kept=10)
    first, second = stored(versions, tmp_path, b"one", through=5), stored(versions, tmp_path, b"two")
    versions.mark(first, Status.CHAMPION)
    versions.mark("gone", Status.CHAMPION)
    again = Versions(tmp_path, kept=10)
    assert [(found.version, found.status) for found in again.all] == [
        (second, Status.CHALLENGER),
        (first, Status.CHAMPION),
    ]
    assert again[first].through == 5
    assert again.data(first) == b"one"
    assert again.find(first[:6]) == [first]


def test_a_damaged_checkpoint_is_not_sent(tmp_path: Path) -> None:
    versions = Versions(tmp_path, kept=10)
    version = stored(versions, tmp_path, b"one")
    versions.path(version).write_bytes(b"two")
    with pytest.raises(OSError, match="has changed"):
        versions.data(version)
    assert version not in Versions(tmp_path, kept=10)
    versions.path(version).unlink()
    with pytest.raises(DamagedError, match="is gone"):
        versions.data(version)
    assert version not in Versions(tmp_path, kept=10)


def test_a_checkpoint_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "versions").mkdir()
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").readlink().name))
    for content, where in ((b"one", tmp_path / "versions"), (b"two", tmp_path)):
        synced.clear()
        path = where / ".made.unfinished"
        path.write_bytes(content)
        version = Version(version=hash_of(path), model="m", hidden_size=4)
        Versions(tmp_path / "versions", kept=10).add(path, version)
        assert synced[0] in (".made.unfinished", f".{version.version}.safetensors.unfinished")
        assert synced[1] == "versions"


def test_old_versions_are_deleted_but_none_in_use(tmp_path: Path) -> None:
    versions = Versions(tmp_path, kept=2)
    made = [stored(versions, tmp_path, bytes([n])) for n in range(5)]
    versions.prune({made[0]})
    assert versions.names == {made[0], made[3], made[4]}
    assert Versions(tmp_path, kept=2).names == versions.names


def test_a_file_that_describes_another_version_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "ab.json").write_bytes(msgspec.json.encode(Version(version="cd", model="m", hidden_size=4)))
    (tmp_path / "ef.json").write_text(json.dumps({"version": 3}))
    assert not Versions(tmp_path, kept=2).all


# --- checkpoints that ship ---


def test_what_ships_is_found_by_its_hash(tmp_path: Path) -> None:
    shipped = by_version()
    assert {found.model for found in shipped.values()} >= {DEFAULT_MODEL}
    assert all(version == hash_of(found.path) for version, found in shipped.items())
    assert ships_for(DEFAULT_MODEL)
    assert not ships_for("another/model")
    (tmp_path / "none.safetensors").write_bytes(b"garbage")
    with pytest.raises(PredictorError, match="not a checkpoint"):
        by_version([tmp_path / "none.safetensors"])
