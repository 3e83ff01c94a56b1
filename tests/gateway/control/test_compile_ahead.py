"""What a user reads while the policies are compiled; the compiler itself is another process."""

import importlib.metadata
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import ares
from ares.gateway.control import compile_ahead
from ares.policy.compiling import cache_directory, compiles

pytestmark = pytest.mark.skipif(not compiles(), reason="numba is not installed: nothing is compiled")


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache_directory.cache_clear()
    yield
    cache_directory.cache_clear()


def compiling(monkeypatch: pytest.MonkeyPatch, status: int) -> list[list[str]]:
    """Let the compiler end with a status; return its command lines."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(compile_ahead.subprocess, "run", run)
    return commands


def test_a_line_before_and_one_after_and_none_the_next_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    commands = compiling(monkeypatch, 0)
    compile_ahead.compile_ahead()
    assert [line.getMessage().partition(",")[0] for line in caplog.records] == [
        "compiling the policies",
        "the policies are compiled",
    ]
    compile_ahead.compile_ahead()
    assert (len(commands), len(caplog.records)) == (1, 2)
    # Another numba cannot use that code, nor can the same sources at another place.
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0")
    compile_ahead.compile_ahead()
    assert len(commands) == 2
    monkeypatch.setattr(ares, "__file__", "/somewhere/else/ares/__init__.py")
    compile_ahead.compile_ahead()
    assert len(commands) == 3


def test_a_compiler_that_fails_is_reported_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commands = compiling(monkeypatch, 3)
    compile_ahead.compile_ahead()
    compile_ahead.compile_ahead()
    assert len(commands) == 2
    assert [line.getMessage() for line in caplog.records if line.levelno == logging.WARNING] == [
        "the policies were not compiled ahead (status 3): they are when needed"
    ] * 2
