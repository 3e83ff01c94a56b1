"""The whole comparison on simulated engines: real gateway, real HTTP, real control channel."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ares.bench.live import saved
from ares.free_ports import free_port

pytest.importorskip("numba", reason="needs the simulate extra")


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "ares", "bench", "live", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=560, check=False)


@pytest.mark.timeout(600)  # on a fresh machine two processes compile the policy and the simulator first
def test_presets_on_simulated_engines(tmp_path: Path) -> None:
    out, report, runs = tmp_path / "live.json", tmp_path / "report", tmp_path / "runs.json"
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
            "--runs",
            str(runs),
        ),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["engines"] == "mock: llama-8b-rtx4090"
    by_preset = {run["preset"]: run for run in result["rounds"][0]["runs"]}
    assert set(by_preset) == {"static-rr", "ares"}
    assert all(run["failed"] == 0 and run["output_tokens_per_s"] > 0 for run in by_preset.values())
    # Every token depends on all before it: a lost or doubled one would show.
    assert result["requests_with_differing_tokens"] == []
    assert result["ratios"][0]["preset"] == "ares"
    assert (report / "live.svg").stat().st_size > 1000
    # Engines that keep to a law are predicted: their clients' pauses tell it, and the gateway its settings. Where other
    # processes compile on the same cores meanwhile, mock engines fall behind their law.
    said = {entry["preset"]: entry["figures"] for entry in result["simulator"]["presets"]}
    for name in ("static-rr", "ares"):
        assert said[name]["tpot_s"]["mean"]["error"] == pytest.approx(0.0, abs=0.25)
        assert said[name]["e2e_s"]["mean"]["error"] == pytest.approx(0.0, abs=0.3)
    kept = saved.read_runs(runs).runs
    assert [run.preset for run in kept] == ["static-rr", "ares"]
    assert kept[1].settings["preset"]["rebalance"] == "ares"
    settings = kept[1].settings
    assert (settings["period_s"], settings["cooldown_s"], settings["slo_ttft_s"]) == (0.5, 3.0, 10.0)
    assert len(kept[1].ended_before) == 4 + 24  # the first requests of all, and the run before
    assert all(row.max_num_seqs == 256 and row.block_size == 16 for row in kept[1].instances)


def test_a_file_of_a_preset_is_the_first_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("prefill: {name: least_time, on_decode: false}\n")
    done = bench("--simulate", "llama-8b-rtx4090", "--presets", f"static-rr,{file}")
    assert done.returncode == 2
    assert f"name {file} first" in done.stderr


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
