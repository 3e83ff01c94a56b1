"""`ares bench simulator` measures whole processes and says where it ran."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ares.cli.bench import app


def test_it_times_the_command(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["--requests", "50", "--decode", "2", "--prefill", "1", "--profile", "r1-qwen-7b-24gb"]
    reply = CliRunner().invoke(
        app, ["simulator", *arguments, "--preset", "static-rr", "--no-first-run", "--json", str(out)]
    )
    assert reply.exit_code == 0, reply.output
    result = json.loads(out.read_text())
    assert {"versions", "commit", "machine"} <= set(result)
    assert result["first_run"] is None
    (run,) = result["runs"]
    assert (run["preset"], run["requests"], run["completed"]) == ("static-rr", 50, 50)
    assert run["wall_s"] > run["loop_s"] > 0
    assert run["cpu_s"] > 0
    assert run["peak_memory_bytes"] > 50e6


def test_bad_input_ends_with_status_2(capfd: pytest.CaptureFixture[str]) -> None:
    reply = CliRunner().invoke(app, ["simulator", "--preset", "x", "--requests", "5", "--no-first-run"])
    assert reply.exit_code == 2
    assert "unknown preset 'x'" in capfd.readouterr().err
