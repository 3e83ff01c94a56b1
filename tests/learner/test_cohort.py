"""Which outputs count, from their pieces; and how shards of them are stored."""

import json
import os
import time
from pathlib import Path

import pytest

from ares.learner.cohort import Recorded, files_of, newest, settled
from ares.learner.recorded import Accepted, Store
from ares.predictor import shards
from ares.predictor.shards import Outcome
from tests.learner import synthetic

LARGEST = (1 << 31) - 1
RUNNING, STOP, LIMIT, LEFT = Outcome.RUNNING, Outcome.STOP, Outcome.LIMIT, Outcome.LEFT


def recorded(name: str, *pieces: tuple[int, int, Outcome], seen: float = 0.0) -> Recorded:
    """An output of pieces: arrival number, length so far, outcome; each with two states."""
    output = Recorded(name, name, pieces[0][0], pieces[0][0], seen)
    for number, length, outcome in pieces:
        output.add(number, length, outcome, 2, seen)
    return output


def test_outputs_later_than_one_that_still_runs_wait_for_it() -> None:
    outputs = [
        recorded("before", (1, 10, STOP)),
        recorded("runs", (2, 10, RUNNING), (5, 30, RUNNING)),
        recorded("same shard", (2, 5, STOP)),
        recorded("short", (3, 5, STOP)),
    ]
    assert [output.request for output in settled(outputs, 0, 600)] == ["before"]
    outputs[1].add(6, 50, STOP, 1, 0)
    assert [output.request for output in settled(outputs, 0, 600)] == ["before", "runs", "same shard", "short"]


def test_a_running_output_without_news_for_long_counts_as_lost() -> None:
    outputs = [recorded("runs", (1, 10, RUNNING)), recorded("short", (2, 5, STOP))]
    assert not settled(outputs, 599, 600)
    lost, short = settled(outputs, 600, 600)
    assert (lost.complete, short.complete) == (False, True)


@pytest.mark.parametrize(
    ("pieces", "outcome", "length"),
    [
        ([(1, 20, RUNNING), (2, 30, STOP)], STOP, 30),
        ([(1, 30, STOP), (2, 20, RUNNING)], STOP, 30),  # the earlier piece comes last
        ([(1, 20, LEFT), (2, 30, RUNNING)], RUNNING, 30),
        ([(1, 20, RUNNING), (2, 20, LEFT)], LEFT, 20),
        ([(1, 30, LIMIT), (2, 30, LEFT)], LIMIT, 30),
        ([(1, 30, LIMIT), (2, 31, STOP)], STOP, 31),
        ([(1, 40, RUNNING), (2, 20, LEFT)], RUNNING, 40),  # the prefill instance's piece comes last
    ],
)
def test_pieces_are_joined(pieces: list[tuple[int, int, Outcome]], outcome: Outcome, length: int) -> None:
    output = recorded("a", *pieces)
    assert (output.outcome, output.length, output.first, output.last) == (outcome, length, 1, 2)
    assert output.count == 4


def test_the_newest_outputs_that_fit() -> None:
    outputs = [recorded(str(n), (n, 10, STOP), (n + 10, 20, STOP)) for n in range(1, 6)]  # four states each
    assert [output.request for output in newest(outputs, 11)] == ["4", "5"]
    assert [output.request for output in newest(outputs, 1)] == ["5"]
    assert newest(outputs, 100) == outputs
    assert files_of(newest(outputs, 8)) == {4, 5, 14, 15}


# --- the store ---


def store(folder: Path, number: int = 0) -> Store:
    folder.mkdir(exist_ok=True)
    made = Store(folder, Accepted(), number)
    made.open()
    return made


def offer(folder: Path, count: int, seed: int) -> bytes:
    return synthetic.shard(folder, synthetic.outputs(count, seed))


def test_a_shard_is_stored_once_and_found_again(tmp_path: Path) -> None:
    made = store(tmp_path / "recorded")
    data = offer(tmp_path, 3, seed=1)
    assert made.take(data, synthetic.CONTEXT)
    assert not made.take(data, synthetic.CONTEXT)
    assert made.take(offer(tmp_path, 2, seed=2), synthetic.CONTEXT)
    again = store(tmp_path / "recorded")
    assert again.number == made.number == 2
    assert again.accepted == Accepted(synthetic.MODEL, synthetic.HIDDEN, synthetic.EVERY)
    for one in (made, again):
        assert [(output.first, output.complete) for output in one.outputs.values()] == [(1, True)] * 3 + [(2, True)] * 2


def test_numbers_never_decrease(tmp_path: Path) -> None:
    made = store(tmp_path / "recorded", number=41)
    made.take(offer(tmp_path, 1, seed=1), synthetic.CONTEXT)
    made.prune(0, 7)
    assert not made.outputs
    made.take(offer(tmp_path, 1, seed=2), synthetic.CONTEXT)
    assert [output.first for output in made.outputs.values()] == [43]


def test_the_oldest_are_deleted_beyond_the_bounds(tmp_path: Path) -> None:
    made = store(tmp_path / "recorded")
    for seed in range(6):
        made.take(offer(tmp_path, 2, seed), synthetic.CONTEXT)
    size = made.size
    assert made.prune(size, 7) == 0
    made.prune(size // 2, 7, used={1})
    kept = {output.first for output in made.outputs.values()}
    assert made.size <= size // 2
    assert 1 in kept
    assert 6 in kept
    assert 2 not in kept
    assert len(list((tmp_path / "recorded").iterdir())) == len(kept)


def test_age_is_measured_by_a_clock_that_does_not_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = store(tmp_path / "recorded")
    made.take(offer(tmp_path, 1, 1), synthetic.CONTEXT)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 30 * 86400)
    assert made.prune(1 << 30, 7) == 0
    monkeypatch.undo()
    # A clock that was ahead when the learner started, and has been corrected since.
    with monkeypatch.context() as ahead:
        ahead.setattr(time, "time", lambda: now + 30 * 86400)
        made = store(tmp_path / "new")
    made.take(offer(tmp_path, 1, 2), synthetic.CONTEXT)
    assert made.prune(1 << 30, 7) == 0
    # A file of a clock that was ahead is not kept for longer.
    (path,) = (tmp_path / "new").iterdir()
    os.utime(path, (now + 30 * 86400, now + 30 * 86400))
    made, began = store(tmp_path / "new"), time.monotonic()
    with monkeypatch.context() as later:
        later.setattr(time, "monotonic", lambda: began + 7.1 * 86400)
        assert made.prune(1 << 30, 7) == 1
    old = now - 8 * 86400
    (path,) = (tmp_path / "recorded").iterdir()
    os.utime(path, (old, old))
    again = store(tmp_path / "recorded")
    assert again.prune(1 << 30, 7) == 1
    assert not list((tmp_path / "recorded").iterdir())


def damaged(data: bytes, **metadata: str) -> bytes:
    """Return a shard's file with other metadata."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] |= metadata
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]


def changed(data: bytes, **lengths: int) -> bytes:
    """Return a shard's file with other lengths of all of its outputs."""
    length = int.from_bytes(data[:8], "little")
    header, result = json.loads(data[8 : 8 + length]), bytearray(data)
    for name, value in lengths.items():
        start, end = (8 + length + offset for offset in header[name]["data_offsets"])
        result[start:end] = value.to_bytes(4, "little") * ((end - start) // 4)
    return bytes(result)


def test_one_bad_shard_is_dropped_also_where_it_is_stored_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = store(tmp_path / "recorded")
    good, bad = offer(tmp_path, 2, seed=1), damaged(offer(tmp_path, 1, seed=2), prompts='["\\ud800"]')
    assert made.take(good, synthetic.CONTEXT)
    assert not made.take(bad, synthetic.CONTEXT)
    (tmp_path / "recorded" / f"{2:012d}-{'0' * 32}.safetensors").write_bytes(bad)  # by an earlier version
    again = store(tmp_path / "recorded")
    assert (len(again.outputs), again.dropped) == (2, {"malformed": 1})
    assert len(list((tmp_path / "recorded").iterdir())) == 1

    def unforeseen(_: Path) -> None:
        raise AttributeError("unforeseen")

    monkeypatch.setattr(shards, "read", unforeseen)
    again = store(tmp_path / "recorded")
    assert (again.outputs, again.dropped) == ({}, {"malformed": 1})
    assert "unforeseen" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "length", "limit", "metadata", "why"),
    [
        (LARGEST, LARGEST, 0, {"limit": str(LARGEST)}, "a limit beyond the model's context"),
        (LARGEST, 20, 0, {}, "longer than the model's context"),
        (3, LARGEST, 0, {}, "malformed"),
        (3, 20, 2_000_000_000, {}, "longer than the model's context"),
        (3, 20, 0, {"limit": "2000000000"}, "a limit beyond the model's context"),
    ],
)
def test_absurd_lengths_are_dropped_and_decide_nothing(
    tmp_path: Path, prompt: int, length: int, limit: int, metadata: dict[str, str], why: str
) -> None:
    made = store(tmp_path / "recorded")
    data = synthetic.shard(tmp_path, synthetic.outputs(1, 1)[:1], synthetic.source(every=7))
    with_lengths = changed(data, prompt_length=prompt, output_length=length)
    assert not made.take(damaged(with_lengths, limits=f"[{limit}]", **metadata), synthetic.CONTEXT)
    assert made.dropped == {why: 1}
    assert made.accepted == Accepted()
    assert made.take(offer(tmp_path, 1, seed=2), synthetic.CONTEXT)


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = store(tmp_path / "recorded")
    data = offer(tmp_path, 1, seed=1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            made.take(data, synthetic.CONTEXT)
    assert not made.outputs
    assert made.take(data, synthetic.CONTEXT)


def test_a_shard_that_cannot_be_deleted_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = store(tmp_path / "recorded")
    for seed in range(3):
        made.take(offer(tmp_path, 1, seed), synthetic.CONTEXT)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    assert made.prune(0, 7) == 3
    assert caplog.text.count("Read-only") == 1
