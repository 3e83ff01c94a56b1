"""Which checkpoint an instance runs with."""

import json
from pathlib import Path

import pytest

from ares.engine.learning.folder import LearningFolder
from ares.engine.prediction import predictor_choice
from ares.engine.prediction.metadata import Prediction
from ares.models.resolve import DEFAULT_MODEL
from ares.predictor.errors import PredictorError

pytest.importorskip("torch", reason="needs torch: the predictor, cpu or vllm extra")


def model(folder: Path, hidden_size: int) -> Path:
    (folder / "config.json").write_text(json.dumps({"hidden_size": hidden_size}))
    return folder


@pytest.mark.parametrize(("name", "hidden_size"), [(DEFAULT_MODEL, 576), ("Qwen/Qwen2.5-Coder-0.5B-Instruct", 896)])
def test_a_checkpoint_ships(tmp_path: Path, name: str, hidden_size: int) -> None:
    chosen = predictor_choice.choose(None, name, model(tmp_path, hidden_size))
    assert chosen is not None
    assert chosen.stat().st_size < 4 << 20
    evaluation = json.loads(chosen.with_suffix(".evaluation.json").read_text())
    assert evaluation["models"][0]["name"] == "ours"


@pytest.mark.parametrize(("name", "hidden_size"), [("another/model", 576), (DEFAULT_MODEL, 577)])
def test_another_model_gets_no_predictor(tmp_path: Path, name: str, hidden_size: int) -> None:
    assert predictor_choice.choose(None, name, model(tmp_path, hidden_size)) is None


def test_none_loads_no_predictor(tmp_path: Path) -> None:
    assert predictor_choice.choose("none", DEFAULT_MODEL, model(tmp_path, 576)) is None


def test_a_given_checkpoint_must_fit(tmp_path: Path) -> None:
    shipped = predictor_choice.choose(None, DEFAULT_MODEL, model(tmp_path, 576))
    with pytest.raises(PredictorError, match="hidden size 576, here 64"):
        predictor_choice.choose(str(shipped), DEFAULT_MODEL, model(tmp_path, 64))
    with pytest.raises(PredictorError, match="not a whole checkpoint"):
        predictor_choice.choose(str(tmp_path / "missing"), DEFAULT_MODEL, tmp_path)


def test_what_was_learned_is_used_again_where_it_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shipped = predictor_choice.choose(None, DEFAULT_MODEL, model(tmp_path, 576))
    assert shipped is not None
    kept = tmp_path / "predictor.safetensors"
    assert predictor_choice.learned(kept, DEFAULT_MODEL, tmp_path) is None
    assert not caplog.messages
    kept.write_bytes(shipped.read_bytes())
    assert predictor_choice.learned(kept, DEFAULT_MODEL, tmp_path) == kept
    assert predictor_choice.learned(kept, "another/model", tmp_path) is None
    kept.write_bytes(kept.read_bytes()[:-1])
    assert predictor_choice.learned(kept, DEFAULT_MODEL, tmp_path) is None
    reasons = [message for message in caplog.messages if "is not used" in message]
    assert "another/model" in reasons[0]
    assert "not a whole checkpoint" in reasons[1]


def test_a_given_checkpoint_gives_way_to_what_was_learned_since(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shipped = predictor_choice.choose(None, DEFAULT_MODEL, model(tmp_path, 576))
    assert shipped is not None
    kept = tmp_path / "predictor.safetensors"
    assert predictor_choice.learned(kept, DEFAULT_MODEL, tmp_path, str(shipped)) is None
    kept.write_bytes(shipped.read_bytes())
    assert predictor_choice.learned(kept, DEFAULT_MODEL, tmp_path, str(shipped)) == kept
    assert f"not with {shipped}: remove the former to begin anew" in caplog.text
    with pytest.raises(PredictorError, match="not a whole checkpoint"):
        predictor_choice.learned(kept, DEFAULT_MODEL, tmp_path, str(tmp_path / "missing"))


def test_an_instance_that_learns_begins_with_what_was_ordered_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learning = LearningFolder(tmp_path / "learning")
    learning.prepare()

    def begins(*, ships: bool = True) -> Path | None:
        return predictor_choice.begin(learning, None, DEFAULT_MODEL, model(tmp_path, 576), ships=ships)

    shipped = begins()
    assert shipped is not None
    assert begins(ships=False) is None
    learning.accepted.write_bytes(shipped.read_bytes())
    assert begins() == begins(ships=False) == learning.accepted
    learning.ended.touch()
    assert begins() is None
    assert "begins without a predictor, as a learner ordered" in caplog.text
    with pytest.raises(PredictorError, match="not a whole checkpoint"):
        predictor_choice.begin(learning, str(tmp_path / "missing"), DEFAULT_MODEL, tmp_path, ships=True)


def test_the_estimate_counts_down_within_its_bounds() -> None:
    prediction = Prediction(20, (5.0, 30.0, 500.0))
    assert prediction.after(20, 100) == (5, 30, 100)
    assert prediction.after(30, 90) == (1, 20, 90)
    assert prediction.after(119, 1) == (1, 1, 1)
    assert prediction.after(120, 0) == (1, 1, 1)
