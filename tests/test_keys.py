"""Keys from files: what is read, what is refused, and that no message shows any of them."""

from pathlib import Path

import pytest

from ares.keys import ControlKey, KeyFileError, read_key, read_keys

SECRET = "3f1c" * 16


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# clients\n\n  {SECRET}  \nother\n")
    assert read_keys(file) == [SECRET, "other"]
    with pytest.raises(KeyFileError, match="2 keys") as refusal:
        read_key(file)
    assert SECRET not in str(refusal.value)
    file.write_text(SECRET + "\n")
    assert read_key(file) == SECRET


def test_a_file_without_a_key(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        read_keys(tmp_path / "none")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(KeyFileError, match="no key"):
        read_keys(tmp_path / "empty")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KeyFileError, match="not text"):
        read_keys(tmp_path / "binary")


def test_a_short_control_key_is_refused_without_being_shown() -> None:
    with pytest.raises(KeyFileError, match="shorter than 32") as refusal:
        ControlKey("hunter2")
    assert "hunter2" not in str(refusal.value)


def test_a_control_key_shows_nothing_of_itself() -> None:
    assert SECRET not in repr(ControlKey(SECRET))
