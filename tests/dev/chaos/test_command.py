"""A short run on mock engines, as a developer starts it; and the addresses that the failing gateway refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ares.free_ports import free_port
from ares_dev.chaos import decisions


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.timeout(300)
def test_a_short_run_on_mock_engines(tmp_path: Path) -> None:
    out = tmp_path / "chaos.json"
    done = run(
        *("ares_dev", "chaos", "--simulate", "llama-8b-rtx4090", "--prefill", "2", "--decode", "6"),
        *("--per-process", "2", "--streams", "24", "--duration", "12", "--events", "1.5", "--kv-tokens", "4096"),
        *(
            "--seed",
            "6",
            "--port",
            str(free_port("127.0.0.1")),
            "--json",
            str(out),
            "--log-folder",
            str(tmp_path / "logs"),
        ),
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())["runs"]
    assert result["violations"] == []
    assert result["outcomes"]["completed"] > 20
    assert any(kind.startswith("move: ") for kind in result["done"])
    assert result["gateway"]["ares_controller_faults_total"] > 0
    assert any(kind.startswith("kill") for kind in result["done"])
    assert any(kind.startswith("role ") for kind in result["done"])
    assert result["decisions"] > 0
    log = tmp_path / "logs" / "6" / "decisions.jsonl"
    assert decisions.check_decisions(log)[1] == []
    # A choice of another instance than the logged one would be found.
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    entry = next(one for one in lines if one["kind"] == "admission" and one["decided"])
    entry["decided"][0]["instance"] += 1
    log.write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert any(violation.startswith("I8") for violation in decisions.check_decisions(log)[1])


def test_the_plan_can_be_printed() -> None:
    shown = [run("ares_dev", "chaos", "--simulate", "x", "--seed", "4", "--show-plan").stdout for _ in range(2)]
    assert shown[0] == shown[1]
    assert json.loads(shown[0])["seed"] == 4


def test_a_failing_gateway_serves_loopback_only() -> None:
    done = run(
        *("ares_dev.chaos.gateway", "gateway", "--host", "192.0.2.1", "--worker", "http://127.0.0.1:1"),
        *("--model", "some/model", "--fault-seed", "1"),
    )
    assert done.returncode == 2
    assert "serves loopback only" in done.stderr
