"""Counters of processes that have ended."""

import logging
import shutil
from pathlib import Path

import pytest

from ares.gateway.processes import kept_metrics

COUNTED = "# HELP a_total A.\n# TYPE a_total counter\na_total 3.0\n"


def test_the_next_process_adds_what_was_shown(tmp_path: Path) -> None:
    assert kept_metrics.begin(tmp_path, 0) == ""
    assert kept_metrics.with_ended(tmp_path, 0, COUNTED, "") == COUNTED
    assert "a_total 3.0" in kept_metrics.read(tmp_path, 0)
    ended = kept_metrics.begin(tmp_path, 0)
    assert "a_total 6.0" in kept_metrics.with_ended(tmp_path, 0, COUNTED, ended)
    assert "a_total 6.0" in kept_metrics.begin(tmp_path, 0)
    assert "a_total 6.0" in kept_metrics.begin(tmp_path, 0), "it has shown nothing, and its next keeps what was before"
    assert "a_total 6.0" in kept_metrics.read(tmp_path, 0)


def test_what_ended_processes_counted_outlasts_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    kept_metrics.with_ended(folder, 0, COUNTED, "")
    ended = kept_metrics.begin(folder, 0)
    shutil.rmtree(folder)
    folder.mkdir()
    assert "a_total 6.0" in kept_metrics.with_ended(folder, 0, COUNTED, ended)
    assert "a_total 6.0" in kept_metrics.begin(folder, 0)


def test_metrics_are_shown_where_they_cannot_be_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept_metrics.begin(tmp_path / "removed", 0)
    with caplog.at_level(logging.ERROR):
        assert kept_metrics.with_ended(tmp_path / "removed", 0, COUNTED, "") == COUNTED
    assert "not kept for the case that this process ends" in caplog.text
    assert kept_metrics.read(tmp_path / "removed", 0) == ""
