"""Training, checkpoints and inference on data whose law is known."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ares.predictor import checkpoint, dataset, evaluation, features, metrics, training
from ares.predictor.errors import PredictorError
from ares.predictor.runtime import Predictor
from tests.predictor.synthetic import HIDDEN, folder

SETTINGS = training.TrainingSettings(epochs=40, members=2, width=16, rate=1e-2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: Path) -> checkpoint.Checkpoint:
    return training.train(dataset.load(data), SETTINGS)[0]


@pytest.fixture(scope="module")
def saved(trained: checkpoint.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "p.safetensors"
    checkpoint.save(path, trained)
    return path


def test_it_learns_what_the_state_tells(data: Path, trained: checkpoint.Checkpoint) -> None:
    """Half of the requests end with a chance of 1/20 a token, half with 1/200 and a limit at 200."""
    pairs = dataset.load(data)
    test = pairs.only(pairs.split("test"))
    median = metrics.at_level(evaluation.of_checkpoint("ours", trained, test).quantiles, 0.5)
    short = test.states[:, 0].astype(float) < 4
    # The true medians are 14 and 138; dropout on eight numbers, one of which counts, pulls them together.
    assert 8 < median[short].mean() < 35
    assert median[~short].mean() > 2 * median[short].mean()
    assert (median <= test.room).all()


def test_one_seed_one_result(data: Path, trained: checkpoint.Checkpoint) -> None:
    again = training.train(dataset.load(data), SETTINGS)[0]
    for name, tensor in trained.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name]), name


def test_the_report_has_the_curve(data: Path) -> None:
    settings = training.TrainingSettings(arch="paper", epochs=3)
    trained, report = training.train(dataset.load(data), settings)
    assert [entry["epoch"] for entry in report["curve"]] == [0, 1, 2]
    assert trained.arch == "paper"


def test_too_few_prompts(tmp_path: Path) -> None:
    pairs = dataset.load(folder(tmp_path, outputs=8))
    with pytest.raises(PredictorError, match="collect more"):
        training.train(pairs, SETTINGS)


def test_inference_sees_what_training_saw(data: Path, trained: checkpoint.Checkpoint) -> None:
    """The worker's incremental path, requests interleaved and in any slots, gives evaluation's own numbers."""
    pairs = dataset.load(data)
    pairs = pairs.only(pairs.output < 12)
    features_of = training.Data.of(pairs, trained.center, trained.scale, trained.network.first)
    with torch.no_grad():
        expected = trained.network.quantiles(features_of.states, features_of.scalars)
    predictor = Predictor(trained, 12)
    order = np.argsort(pairs.position, kind="stable")
    for position in np.unique(pairs.position):
        rows = torch.from_numpy(order[pairs.position[order] == position].copy())
        got = predictor.predict(
            11 - torch.from_numpy(pairs.output)[rows],
            torch.from_numpy(pairs.states)[rows],
            torch.from_numpy(pairs.position)[rows],
            torch.from_numpy(pairs.prompt_length)[rows],
            torch.arange(len(rows) if position == 0 else 0),
        )
        assert torch.allclose(got, expected[rows], rtol=1e-3, atol=1e-2)


def test_a_forgotten_slot_is_fresh(trained: checkpoint.Checkpoint) -> None:
    predictor, state = Predictor(trained, 1), torch.randn(1, HIDDEN)
    slot, zero, prompt = torch.tensor([0]), torch.tensor([0]), torch.tensor([3])
    first = predictor.predict(slot, state, zero, prompt, slot)
    predictor.predict(slot, torch.randn(1, HIDDEN), zero, prompt, slot[:0])
    predictor.forget([0])
    assert torch.equal(first, predictor.predict(slot, state, zero, prompt, slot))


def test_a_repeating_text_is_seen() -> None:
    history = features.History(1, 4)
    slot, state = torch.tensor([0]), torch.randn(1, 4)
    _, first = history.update(slot, state)
    _, other = history.update(slot, -state)
    _, again = history.update(slot, state)
    assert first.tolist() == [[0, 0, 0]]
    assert other[0].tolist() == pytest.approx([-1, -1, -1], abs=1e-2)
    assert again[0].tolist() == pytest.approx([-1, 1, 0], abs=1e-2)


def test_a_checkpoint_comes_back(data: Path, trained: checkpoint.Checkpoint, saved: Path) -> None:
    loaded = checkpoint.load(saved)
    pairs = dataset.load(data)
    before = evaluation.of_checkpoint("a", trained, pairs).quantiles
    after = evaluation.of_checkpoint("b", loaded, pairs).quantiles
    # Half precision on disk.
    assert np.allclose(before, after, rtol=0.02, atol=0.5)


def test_a_checkpoint_that_does_not_fit_says_all_that_differs(saved: Path) -> None:
    with pytest.raises(PredictorError) as failure:
        checkpoint.load(saved).check("other/model", 16, "elsewhere")
    for word in ("synthetic/model", "other/model", "8, here 16", "elsewhere"):
        assert word in str(failure.value)


def test_a_truncated_checkpoint(saved: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(PredictorError, match="not a whole checkpoint"):
        checkpoint.load(cut)


def test_a_checkpoint_of_another_version(
    trained: checkpoint.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", "0")
    checkpoint.save(tmp_path / "old.safetensors", trained)
    monkeypatch.undo()
    with pytest.raises(PredictorError, match="format 0, this version reads 1; train it again"):
        checkpoint.load(tmp_path / "old.safetensors")


def test_a_checkpoint_with_nan(trained: checkpoint.Checkpoint, saved: Path, tmp_path: Path) -> None:
    broken = checkpoint.load(saved)
    broken.center[0] = float("nan")
    checkpoint.save(tmp_path / "nan.safetensors", broken)
    with pytest.raises(PredictorError, match="not finite"):
        checkpoint.load(tmp_path / "nan.safetensors")


def test_a_move_is_seen_as_a_history_that_begins_anew(data: Path, trained: checkpoint.Checkpoint) -> None:
    pairs = dataset.load(data)
    behind = pairs.moved(seed=1)
    first = np.flatnonzero(np.diff(pairs.output, prepend=-1))
    assert not behind[first].any()
    lengths = np.diff(np.append(first, len(pairs)))
    # Every output that can be moved is, once: what is behind stays behind.
    assert len(np.unique(pairs.output[behind])) == (lengths > 1).sum()
    assert (np.diff(behind.astype(int))[np.diff(pairs.output) == 0] >= 0).all()
    anew = features.of_pairs(pairs.only(behind), trained.center, trained.scale)[0]
    newest, mean = anew.chunk(2, dim=1)
    begun = np.flatnonzero(np.diff(pairs.only(behind).output, prepend=-1))
    assert torch.equal(newest[begun], mean[begun])
    assert pairs.moved(seed=1, share=0.0).sum() == 0


def test_behind_a_move_the_averages_go_on(data: Path, trained: checkpoint.Checkpoint) -> None:
    pairs = dataset.load(data)
    behind = pairs.moved(seed=1)
    whole = training.Data.of(pairs, trained.center, trained.scale, trained.network.first)
    moved = whole.moved(pairs, behind, trained.center, trained.scale, averages=True)
    expected = whole.only(behind)
    # A number of an average takes a byte on its way.
    largest = float(expected.states.abs().max())
    torch.testing.assert_close(moved.states, expected.states, rtol=0, atol=largest / 127)
    lost = whole.moved(pairs, behind, trained.center, trained.scale)
    assert float((lost.states - expected.states).abs().max()) > largest / 10
    # The earlier states that the newest is compared with do not travel.
    assert torch.equal(moved.scalars, lost.scalars)
    assert torch.equal(moved.remaining, expected.remaining)
