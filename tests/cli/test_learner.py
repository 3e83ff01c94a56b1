"""The commands of a learner's folder."""

import json
import sys
from pathlib import Path

import pytest

from ares.cli import main as cli
from ares.learner.folder import Folder
from ares.learner.history import History


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ares", "predictor", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Folder(tmp_path).prepare()
    history = History(tmp_path / "history.jsonl")
    history.add("promoted", "better by 20 tokens", "ab" * 32, outputs=150)
    history.flush()
    return tmp_path


def test_history(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "history", "--folder", str(folder)) == 0
    shown = capsys.readouterr().out
    assert "promoted" in shown
    assert "abababababab " in shown
    assert "better by 20 tokens" in shown
    assert run(monkeypatch, "history", "--folder", str(folder), "--json") == 0
    (event,) = json.loads(capsys.readouterr().out)
    assert event["outputs"] == 150


def test_freeze_and_its_end(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ARES_LEARNER_FOLDER", str(folder))
    assert run(monkeypatch, "freeze") == 0
    assert run(monkeypatch, "freeze", "--off") == 0
    assert run(monkeypatch, "history") == 0
    shown = capsys.readouterr().out
    assert "nothing is trained, promoted or demoted" in shown
    assert "unfrozen" in shown


def test_commands_do_not_read_the_settings_of_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARES_LEARNER_THREADS", "0")
    assert run(monkeypatch, "freeze", "--folder", str(folder)) == 0
    assert "frozen" in capsys.readouterr().out


def test_a_damaged_history_is_shown_as_far_as_it_goes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (folder / "history.jsonl").open("a") as file:
        file.writelines(f'{{"time": {when}, "event": "error", "version": "", "text": "x"}}\n' for when in ('"x"', 1e30))
    assert run(monkeypatch, "history", "--folder", str(folder)) == 0
    assert "better by 20 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rollback", "--folder", "FOLDER"], "nothing to roll back to"),
        (["rollback", "abcd", "--folder", "FOLDER"], "'abcd' matches none of the versions: none, or curve"),
        (["rollback", "--folder", "FOLDER/none"], "no learner has worked here"),
        (["history", "--folder", "FOLDER/none"], "no learner has worked here"),
        (["learn", "--folder", "FOLDER"], "give --gateway URL, or --worker URL"),
        (["learn", "--folder", "FOLDER", "--worker", "http://a", "--set", "threads=many"], "'threads'"),
        (["learn", "--folder", "FOLDER", "--worker", "http://a", "--checkpoint", "FOLDER/none"], "cannot be read"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *(word.replace("FOLDER", str(folder)) for word in arguments)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
