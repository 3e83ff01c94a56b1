"""The whole comparison on simulated engines: real gateway, real HTTP, real control channel."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ares.engine.defaults import free_port

pytest.importorskip("numba", reason="needs the simulate extra")


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "ares", "bench", "live", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def test_presets_on_simulated_engines(tmp_path: Path) -> None:
    out, report = tmp_path / "live.json", tmp_path / "report"
    done = bench(
        *("--simulate", "llama-8b-rtx4090", "--kv-tokens", "6000", "--requests", "24", "--rounds", "1"),
        *("--load", "3"),
        *(
            "--presets",
            "static-rr,ares",
            "--port",
            str(free_port("127.0.0.1")),
            "--json",
            str(out),
            "--report",
            str(report),
        ),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["engines"] == "simulated: llama-8b-rtx4090"
    runs = {run["preset"]: run for run in result["rounds"][0]["runs"]}
    assert set(runs) == {"static-rr", "ares"}
    assert all(run["failed"] == 0 and run["output_tokens_per_s"] > 0 for run in runs.values())
    # Every token depends on all before it: a lost or doubled one would show.
    assert result["requests_with_differing_tokens"] == []
    assert result["ratios"][0]["preset"] == "ares"
    assert (report / "live.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give --prompts FILE"),
        (("--simulate", "a100"), "a100: no such profile"),
        (("--simulate", "llama-8b-rtx4090", "--workload", "nowhere.csv"), "nowhere.csv"),
        (("--simulate", "llama-8b-rtx4090", "--presets", "static-rr,fast"), "unknown preset 'fast'"),
    ],
)
def test_what_cannot_run_is_said_at_once(arguments: tuple[str, ...], said: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
