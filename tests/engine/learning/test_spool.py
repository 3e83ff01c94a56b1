"""The folder of recorded states that wait for a learner."""

from pathlib import Path

import numpy as np
import pytest

from ares.engine.learning import spool
from ares.predictor import shards
from ares.predictor.errors import PredictorError

SOURCE = shards.Source("m", 64, 20, 1000, shards.LIVE)


def output(name: str) -> shards.Output:
    state = np.zeros(SOURCE.hidden_size, np.float16)
    return shards.Output(name, "p", [1], [2] * 40, positions=[0, 20], states=[state, state])


def written(target: spool.Spool, *names: str) -> None:
    for name in names:
        target.write(SOURCE, [output(name)], token_ids=False)


def requests(folder: Path) -> list[str]:
    return [request for name, _ in spool.waiting(folder) for request in shards.read(folder / name).requests]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_shards_wait_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    written(spool.Spool(tmp_path), "a", "b")
    written(spool.Spool(tmp_path), "c")  # after a restart
    assert requests(tmp_path) == ["a", "b", "c"]
    assert all(spool.is_name(name) for name, _ in spool.waiting(tmp_path))


@pytest.mark.parametrize(
    "name", ["part-x.safetensors", "../part-000000000001-0123abcd.safetensors", "predictor.safetensors", "", "."]
)
def test_other_files_are_not_of_the_spool(name: str, tmp_path: Path) -> None:
    assert not spool.is_name(name)
    assert spool.waiting(tmp_path / "missing") == []


def test_the_oldest_are_removed_beyond_the_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(spool.Spool(tmp_path), "a")
    ((_, size),) = spool.waiting(tmp_path)
    bounded = spool.Spool(tmp_path, spool.Bounds(largest_bytes=3 * size + size // 2))
    written(bounded, "b", "c", "d", "e")
    assert requests(tmp_path) == ["c", "d", "e"]
    assert bounded.removed == 2
    assert sum("no learner takes" in message for message in caplog.messages) == 1


def test_what_is_old_is_removed(tmp_path: Path) -> None:
    clock = Clock()
    bounded = spool.Spool(tmp_path, spool.Bounds(longest_s=100), clock)
    written(bounded, "a")
    clock.now += 60
    written(bounded, "b")
    clock.now += 60
    bounded.trim()
    assert requests(tmp_path) == ["b"]
    # Another process counts from when it saw them.
    again = spool.Spool(tmp_path, spool.Bounds(longest_s=100), clock)
    again.trim()
    assert requests(tmp_path) == ["b"]


def test_unfinished_files_of_an_earlier_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".part-000000000001-0123abcd.safetensors.unfinished").write_bytes(b"half")
    written(spool.Spool(tmp_path), "a")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(PredictorError, match=r"file/part-0.*cannot be written"):
        written(spool.Spool(tmp_path / "file"), "a")
