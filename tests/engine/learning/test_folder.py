"""The learning folder of an instance."""

from pathlib import Path

import pytest

from ares.engine.learning import folder as learning
from ares.engine.learning.folder import LearningFolder, Predicting


def test_every_model_and_instance_has_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_CACHE", str(tmp_path))
    models = ["owner/model", "owner_model", "/data/owner/model", "../model", "..", "model"]
    found = {learning.default_folder(model, name) for model in models for name in ("decode-8100", "a/b")}
    assert len(found) == 2 * len(models)
    assert all(path.resolve().is_relative_to(tmp_path / "learning") for path in found)
    assert all(len(path.relative_to(tmp_path).parts) == 3 for path in found)


def test_a_start_removes_what_was_unfinished_and_keeps_the_rest(tmp_path: Path) -> None:
    found = LearningFolder(tmp_path)
    found.prepare()
    for file in (found.unfinished, found.incoming("0" * 64)):
        file.write_bytes(b"old")
    kept = (found.accepted, found.recorded / "part-000000000001-0123abcd.safetensors")
    for file in kept:
        file.write_bytes(b"kept")
    found.order("0" * 64)
    found.report(Predicting("0" * 64))
    found.prepare()
    assert found.wanted() is None
    assert found.predicting() is None
    assert {file for file in tmp_path.rglob("*") if file.is_file()} == set(kept)


@pytest.mark.parametrize("text", ["", "{", '{"version": 7}', "\xff"])
def test_a_damaged_file_says_nothing(tmp_path: Path, text: str) -> None:
    found = LearningFolder(tmp_path)
    for name in ("wanted.json", "predicting.json"):
        (tmp_path / name).write_text(text)
    assert found.wanted() is None
    assert found.predicting() is None


def test_the_version_is_the_sha_256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert learning.version_of(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
