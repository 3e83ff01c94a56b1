"""Keys from files: what is read, what is refused, and that no message shows any of them."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ares.protocol.keys import ControlKey, KeyFileError, read_key, read_keys, refuse_key_flag

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


@pytest.mark.parametrize("text", [f"\ufeff{SECRET}\r\nother \t\r\n", f"\ufeff# clients\r\n{SECRET}\r\n\ufeffother"])
def test_a_file_from_windows(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_bytes(text.encode())
    assert read_keys(tmp_path / "keys") == [SECRET, "other"]


def test_a_control_key_with_a_newline_is_the_same_key() -> None:
    """A Secret of Kubernetes made with `echo` ends in one; another host may have it from a file."""
    socket: Any = SimpleNamespace()
    ControlKey(SECRET).connect(socket)
    assert ControlKey(f"{SECRET}\n").callback("", socket.curve_publickey)
    assert not ControlKey("other" * 8).callback("", socket.curve_publickey)


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


@pytest.mark.parametrize(
    "flags",
    [
        ["--api-key", SECRET],
        [f"--api-key={SECRET}"],
        ["--api_key", SECRET],
        ["--max-model-len", "9", "--api-k", SECRET],
    ],
)
def test_a_key_on_a_command_line_is_refused_without_being_shown(flags: list[str]) -> None:
    with pytest.raises(KeyFileError, match="VLLM_API_KEY") as refusal:
        refuse_key_flag(flags)
    assert SECRET not in str(refusal.value)
    refuse_key_flag(["--api-server-count", "2", "--served-model-name", "--my-api-key"])


@pytest.mark.parametrize(
    "command",
    [
        ["worker", "--role", "decode"],
        ["worker", "--role", "decode", "--simulate", "llama-8b-rtx4090"],
        ["up"],
        ["up", "--simulate", "llama-8b-rtx4090"],
    ],
)
def test_commands_refuse_a_key_before_they_start_anything(command: list[str]) -> None:
    whole = [sys.executable, "-m", "ares", *command, "--model", "no/such/model", "--", "--api-key", SECRET]
    done = subprocess.run(whole, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "VLLM_API_KEY" in done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stdout + done.stderr
