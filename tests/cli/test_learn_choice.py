"""When `ares up` learns, and what it refuses."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from ares.cli.learn_choice import LearnChoice, choose
from ares.learner.folder import Folder
from ares.models.resolve import DEFAULT_MODEL


class Asked:
    """The choice for options, and what was printed."""

    def __init__(
        self,
        learn: bool | None = None,
        folder: Path | None = None,
        predictor: str | None = None,
        model: str = "any/model",
        *,
        simulated: bool = False,
    ) -> None:
        printed = io.StringIO()
        console = Console(file=printed, width=1000)
        self.choice: LearnChoice = choose(learn, folder, predictor, model, simulated=simulated, console=console)
        self.printed = printed.getvalue()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_CACHE", str(tmp_path))


def test_a_model_without_a_checkpoint_learns_and_it_is_said(tmp_path: Path) -> None:
    asked = Asked()
    assert asked.choice == LearnChoice(tmp_path / "learner" / "any--model", None)
    assert asked.choice.worker_flags == asked.choice.learner_flags == ()
    assert "no predictor ships: learns a predictor for any/model" in asked.printed
    assert "--no-learn" in asked.printed
    assert str(asked.choice.folder) in asked.printed


def test_a_model_with_one_learns_only_where_it_is_asked_for(tmp_path: Path) -> None:
    assert Asked(model=DEFAULT_MODEL).choice.folder is None
    asked = Asked(True, tmp_path / "mine", model=DEFAULT_MODEL)
    assert asked.choice.folder == tmp_path / "mine"
    assert (
        f"learns a predictor for {DEFAULT_MODEL} from the requests that it serves, in {tmp_path / 'mine'}"
        in asked.printed
    )
    assert "--no-learn" not in asked.printed


def test_a_given_predictor_is_not_replaced_unasked() -> None:
    assert Asked(predictor="none").choice == LearnChoice(None, "none")
    assert Asked(predictor="my.safetensors").choice.folder is None
    choice = Asked(True, predictor="my.safetensors").choice
    assert choice.worker_flags == ("--predictor", "my.safetensors")
    assert choice.learner_flags == ("--checkpoint", str(Path("my.safetensors").resolve()))


def test_learning_without_the_checkpoint_that_ships() -> None:
    asked = Asked(predictor="learn", model=DEFAULT_MODEL)
    assert asked.printed.startswith("learns a predictor")
    choice = asked.choice
    assert choice.folder is not None
    assert choice.worker_flags == ("--predictor", "learn")
    assert choice.learner_flags == ()


def test_it_can_be_turned_off() -> None:
    asked = Asked(False)
    assert asked.choice == LearnChoice(None, None)
    assert asked.printed == ""


def test_mock_engines_do_not_learn() -> None:
    assert Asked(simulated=True).choice.folder is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn": True, "simulated": True}, "--learn has no effect with --simulate"),
        ({"folder": Path("x"), "simulated": True}, "--learn-folder has no effect with --simulate"),
        ({"predictor": "learn", "simulated": True}, "--predictor learn has no effect with --simulate"),
        ({"learn": False, "folder": Path("x")}, "--learn-folder has no effect with --no-learn"),
        ({"folder": Path("x"), "model": DEFAULT_MODEL}, "--learn-folder has no effect without --learn"),
        ({"learn": False, "predictor": "learn"}, "contradict each other"),
        ({"learn": True, "predictor": "none"}, "--predictor learn begins without"),
    ],
)
def test_what_contradicts_is_refused(
    options: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        Asked(**options)  # type: ignore[arg-type] # options of every type, by name
    assert message in capsys.readouterr().err


def test_a_folder_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Folder(tmp_path / "learner" / "any--model").locked():
        asked = Asked()
        assert asked.choice.folder is None
        assert "it learns none: the learner with pid" in asked.printed
        with pytest.raises(SystemExit):
            Asked(True)
    assert "give another --learn-folder" in capsys.readouterr().err
