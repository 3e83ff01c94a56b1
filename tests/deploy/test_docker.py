"""The Dockerfiles: checked by hadolint; they are not built, since that needs base images."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from tests.deploy.commands import parsed

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(["hadolint", "--no-color", *FILES], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_command_is_a_process_that_gets_signals(file: Path) -> None:
    text = file.read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    assert json.loads(entry) == ["tini", "--", "ares"]  # JSON: without a shell between
    (arguments,) = re.findall(r"^CMD (.*)$", text, re.MULTILINE)
    *command, asked = json.loads(arguments)
    assert asked == "--help"
    with pytest.raises(typer.Exit) as ended:
        parsed([*command, "--help"])
    assert ended.value.exit_code == 0
    assert re.search(r"^USER 1000:1000$", text, re.MULTILINE)


def test_only_what_the_build_needs_is_sent_to_it() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    needed = {"src", "pyproject.toml", "README.md", "LICENSE"}
    assert set(ignored) == {"*"} | {f"!{name}" for name in needed}
    assert all((ROOT / name).exists() for name in needed)
