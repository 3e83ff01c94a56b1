from pathlib import Path

import numpy as np
import pytest

from ares.predictor import dataset, shards
from ares.predictor.errors import PredictorError
from ares.predictor.shards import Output
from tests.predictor.synthetic import HIDDEN, folder, source


def outputs(value: float = 0.5) -> list[Output]:
    states = [np.full(HIDDEN, value, np.float16), np.full(HIDDEN, 2.0, np.float16)]
    return [Output("a.0", "a", [5, 6], list(range(33)), False, [0, 20], states)]


def test_round_trip(tmp_path: Path) -> None:
    file = shards.write(tmp_path, source(), outputs())
    shard = shards.read(file)
    assert shard.source == source()
    assert shard.requests == ["a.0"]
    assert shard.tensors["remaining"].tolist() == [33, 13]
    assert shard.tensors["output_tokens"].tolist() == list(range(33))
    pairs = dataset.load(tmp_path)
    assert pairs.room.tolist() == [200, 180]
    assert pairs.states[1, 0] == 2.0


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    file = shards.write(tmp_path, source(), outputs())
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(PredictorError, match=f"{file.name}: not a whole shard"):
        dataset.load(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    shards.write(tmp_path, source(), outputs(value))
    with pytest.raises(PredictorError, match="not finite"):
        dataset.load(tmp_path)


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "FORMAT", "0")
    shards.write(tmp_path, source(), outputs())
    monkeypatch.undo()
    with pytest.raises(PredictorError, match="format 0, this version reads 1"):
        dataset.load(tmp_path)


def test_states_of_two_models_do_not_mix(tmp_path: Path) -> None:
    shards.write(tmp_path, source(), outputs())
    shards.write(tmp_path, source("another/model"), outputs())
    with pytest.raises(PredictorError, match="model is"):
        dataset.load(tmp_path)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match="no shards"):
        dataset.load(tmp_path)


def test_a_full_disk_leaves_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards.write(tmp_path, source(), outputs())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PredictorError, match="No space left"):
        shards.write(tmp_path, source(), outputs())
    assert len(list(tmp_path.iterdir())) == 1
    assert len(dataset.load(tmp_path)) == 2


def test_a_request_that_stands_twice_counts_once(tmp_path: Path) -> None:
    shards.write(tmp_path, source(), outputs())
    shards.write(tmp_path, source(), outputs())
    assert len(dataset.load(tmp_path)) == 2


def test_no_prompt_is_in_two_splits(tmp_path: Path) -> None:
    pairs = dataset.load(folder(tmp_path))
    prompts = [{pairs.prompts[n] for n in pairs.output[pairs.split(name)]} for name in dataset.SPLITS]
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]
    assert sum(map(len, prompts)) == 150
    assert 0.6 < len(prompts[0]) / 150 < 0.8
