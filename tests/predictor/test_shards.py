from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

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


def of_an_earlier_version(file: Path) -> None:
    """Rewrite a shard without the metadata that earlier versions did not have."""
    with safe_open(file, framework="numpy") as opened:
        metadata = {name: text for name, text in opened.metadata().items() if name not in {"outcomes", "limits"}}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    file.write_bytes(save(tensors, metadata))


def test_shards_of_earlier_versions_are_read(tmp_path: Path) -> None:
    states = [np.ones(HIDDEN, np.float16)]
    made = [
        Output("stop", "a", [5, 6], [7] * 30, False, [0], states),
        Output("limit", "b", [5, 6], [7] * 200, True, [0], states),
        Output("left", "c", [5, 6], [7] * 30, True, [0], states),
    ]
    file = shards.write(tmp_path, source(), made)
    of_an_earlier_version(file)
    assert [str(outcome) for outcome in shards.read(file).outcomes] == ["stop", "limit", "left"]
    pairs = dataset.load(tmp_path)
    assert pairs.outcomes == ("stop", "limit", "left")
    assert pairs.censored.tolist() == [False, True, True]
    assert pairs.limits.tolist() == [200] * 3


def test_token_ids_are_optional(tmp_path: Path) -> None:
    shard = shards.read(shards.write(tmp_path, source(), outputs(), token_ids=False))
    assert not shard.has_token_ids
    assert shard.tensors["output_tokens"].size == shard.tensors["prompt_tokens"].size == 0
    assert shard.tensors["output_length"].tolist() == [33]
    pairs = dataset.load(tmp_path)
    assert pairs.remaining.tolist() == [33, 13]
    with pytest.raises(PredictorError, match="the noise floor needs token ids, which were not recorded for 1 of 1"):
        pairs.require_token_ids("the noise floor")


def test_token_ids_that_are_there_are_enough(tmp_path: Path) -> None:
    assert shards.read(shards.write(tmp_path, source(), outputs())).has_token_ids
    dataset.load(tmp_path).require_token_ids("the noise floor")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("outcomes", '["ended"]', "not a valid Outcome"),
        ("outcomes", '["running"]', "contradict"),
        ("outcomes", "[]", "list of 1"),
        ("limits", "[1.5]", "whole numbers"),
        ("limits", "[-1]", "whole numbers"),
        ("limits", "[5, 5]", "list of 1"),
        ("limit", "32", "an output of 33 tokens, the limit is 32"),
        ("limit", str(1 << 31), "in 32 bits"),
        ("every", str(1 << 64), "in 32 bits"),
        ("prompts", '["\\ud800"]', "surrogates not allowed"),
        ("requests", '["\\ud800"]', "surrogates not allowed"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = shards.write(tmp_path, source(), outputs())
    with safe_open(file, framework="numpy") as opened:
        metadata, tensors = opened.metadata(), {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118 - no map
    file.write_bytes(save(tensors, metadata | {name: text}))
    with pytest.raises(PredictorError, match=message):
        shards.read(file)


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
