"""`ares check` as a command: its options, its status, its file, and what it leaves."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from ares.cli.main import app
from ares.free_ports import free_port
from tests.gateway.conftest import byte_tokenizer, model_folder  # noqa: F401 - fixtures

pytestmark = pytest.mark.timeout(240)
KEY = "0123456789abcdef" * 4


@pytest.fixture
def nothing() -> str:
    """A URL at which nothing answers."""
    return f"http://127.0.0.1:{free_port('127.0.0.1')}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--worker", "nonsense"], "is not the URL of an instance"),
        (["--worker", "http://127.0.0.1:1", "--simulate", "llama-8b-rtx4090", "--decode", "3"], "--decode, --simulate"),
        (["--worker", "http://127.0.0.1:1", "--dtype", "float32"], "--dtype, float32: no effect"),
        (["--worker", "http://127.0.0.1:1", "--log", "decode-0"], "expected the name of an instance, =, and a file"),
        (["--log", "decode-0=/dev/null"], "--log: no effect without --worker"),
        (["--simulate", "no-such-profile"], "no-such-profile"),
        (["--worker", "http://127.0.0.1:1", "--json", "/proc/none/report.json"], "--json /proc/none/report.json"),
    ],
)
def test_bad_input_ends_with_status_2_and_what_is_wrong(options: list[str], message: str) -> None:
    command = [sys.executable, "-m", "ares", "check", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_an_instance_that_cannot_be_reached_is_a_row_and_status_1(nothing: str, tmp_path: Path) -> None:
    key, file = tmp_path / "key", tmp_path / "reports" / "check.json"
    key.write_text(f"{KEY}\n")
    options = ["--worker", nothing, "--control-key-file", str(key), "--json", str(file)]
    done = CliRunner().invoke(app, ["check", *options])
    assert done.exit_code == 1, done.output
    assert "cannot be reached: connection refused" in done.output
    written = file.read_text()
    report = json.loads(written)
    assert report["failed"] is True
    assert report["rows"][0]["outcome"] == "fail"
    assert report["versions"]["ares"]
    assert report["machine"]["cores"]
    assert report["settings"]["started_here"] is False
    assert KEY not in written + done.output


def test_a_password_in_a_url_is_refused_and_not_shown(nothing: str) -> None:
    url = nothing.replace("http://", "http://user:secret@")
    command = [sys.executable, "-m", "ares", "check", "--worker", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "user name or password" in done.stderr
    assert "secret" not in done.stdout + done.stderr


def test_a_cluster_that_is_started_passes_and_nothing_of_it_is_left(model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "check.json"
    command = [sys.executable, "-m", "ares", "check", "--simulate", "llama-8b-rtx4090", "--model", str(model_folder)]
    command += ["--log-folder", str(tmp_path), "--outputs", "1", "--json", str(file), "--", "--speed", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    outcomes = {row["check"]: row["outcome"] for row in report["rows"]}
    assert outcomes["decode-0 -> decode-1"] == outcomes["prefill-0 -> decode-0"] == outcomes["all pairs"] == "pass"
    assert not report["failed"]
    assert report["summary"] in done.stdout
    assert not [process for process in psutil.process_iter() if str(tmp_path) in " ".join(_command(process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_help_teaches_a_first_call() -> None:
    done = CliRunner().invoke(app, ["check", "--help"], env={"COLUMNS": "120"})
    assert done.exit_code == 0
    for part in ("ares check --worker", "ares check --dtype float32", "--control-key-file", "Status 1"):
        assert part in done.output
