"""Kills, drains and a soak, each very short, on simulated engines: the commands work, and nothing is lost."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ares.engine.defaults import free_port

ENGINES = ("--simulate", "llama-8b-rtx4090")


def bench(folder: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "out.json"
    command = [sys.executable, "-m", "ares", "bench", *arguments, *ENGINES, "--json", str(out)]
    command += ["--port", str(free_port("127.0.0.1"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(out.read_text()))


def test_kills(tmp_path: Path) -> None:
    counts = ("--kills", "2", "--prefill-kills", "1", "--streams", "4", "--tokens", "200")
    result = bench(tmp_path, "kills", *counts)
    assert result["requests_lost"] == result["streams_with_other_tokens"] == result["blocks_left"] == 0
    assert result["decode"]["kills"] == len(result["decode_kills"]) == 2
    assert {kill["instance"] for kill in result["decode_kills"]} == {"decode-0", "decode-1"}
    assert result["decode"]["resumed"]["count"] == sum(kill["streams"] for kill in result["decode_kills"]) >= 2
    assert 0 < result["decode"]["resumed"]["p50_ms"] <= result["decode"]["resumed"]["max_ms"]
    assert result["prefill"]["kills"] == 1


def test_drain(tmp_path: Path) -> None:
    counts = ("--running", "6", "--repeats", "1", "--streams", "4", "--tokens", "200")
    result = bench(tmp_path, "drain", *counts)
    assert [turn["requests_there"] for turn in result["turns"]] == [6, 6]
    assert result["drains"]["streams"] == 12
    assert result["drains"]["requests_lost"] == result["drains"]["streams_with_other_tokens"] == 0
    rolling = result["rolling_restart"]
    assert rolling["requests_lost"] == rolling["streams_with_other_tokens"] == result["blocks_left"] == 0
    assert len(rolling["workers"]) == 2
    assert result["moves"]["moved"] >= 6


def test_soak(tmp_path: Path) -> None:
    times = ("--minutes", "0.1", "--interval", "0.5", "--lull", "2")
    result = bench(tmp_path, "soak", *times, "--report", str(tmp_path))
    assert result["verdict"] == "everything held"
    assert result["moves"]["moved"] > 0
    assert result["outputs"]["right"] > 10
    assert sum(sample["resting"] for sample in result["samples"]) >= 3
    watched = {row["series"] for row in result["series"]}
    assert {"gateway/rss_mb", "gateway/tasks", "prefill-0/descriptors", "decode-1/kv_blocks_used"} <= watched
    assert (tmp_path / "soak.svg").stat().st_size > 1000
