"""The developers' commands: each has its help, and errors that its user can correct are one line."""

import subprocess
import sys

import pytest

from ares_dev.__main__ import app


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "ares_dev", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_the_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0, done.stderr
    for command in app.registered_commands:
        name = command.name
        (line,) = [line for line in done.stdout.splitlines() if line.strip(" │").startswith(f"{name} ")]
        assert len(line.strip(" │").removeprefix(name).split()) > 4, f"{name} has no description"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kills", "--simulate", "no-such-profile"), "no-such-profile"),
        (("footprint", "--simulate", "llama-8b-rtx4090", "--model", "/no/such/folder"), "/no/such/folder"),
    ],
)
def test_an_error_of_the_user_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
