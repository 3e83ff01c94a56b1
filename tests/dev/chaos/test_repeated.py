"""A seed that found something finds it again, and so does the plan that was executed."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ares.free_ports import free_port

COMMAND = """
from ares_dev.__main__ import main
from ares_dev.chaos import command

command._GATEWAY = "tests.dev.chaos.faulty_gateway"
main()
"""


def run(tmp_path: Path, name: str, *more: str) -> tuple[dict[str, Any], Path]:
    """Run a short plan, mostly of moves, on a gateway with a fault; return the result and the executed plan."""
    out, logs = tmp_path / f"{name}.json", tmp_path / name
    done = subprocess.run(
        [
            *(sys.executable, "-c", COMMAND, "chaos", "--simulate", "llama-8b-rtx4090", "--prefill", "1"),
            *("--decode", "4", "--per-process", "2", "--streams", "8", "--duration", "5", "--events", "0.001"),
            *("--longest", "200", "--moves", "16", "--faults", "0", "--preset", "off", "--seed", "5"),
            *("--port", str(free_port("127.0.0.1")), "--json", str(out), "--log-folder", str(logs), *more),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    (result,) = json.loads(out.read_text())["runs"]
    executed = logs / "5" / "executed-5.json"
    assert str(executed) in "".join(done.stderr.split())
    return result, executed


def hit(result: dict[str, Any]) -> set[str]:
    """Return the names of the requests that lost a token; nothing else may be wrong."""
    assert all("1 lost before token" in violation for violation in result["violations"] if "I4" in violation)
    return {violation.split()[2] for violation in result["violations"] if violation.startswith("I3, I4")}


@pytest.mark.timeout(300)
def test_a_planted_fault_is_found_again(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:  # mostly they wait
        (found, executed), (by_seed, _) = pool.map(partial(run, tmp_path), ("found", "by-seed"))
    assert hit(found)
    assert hit(by_seed)
    again, _ = run(tmp_path, "by-plan", "--plan", str(executed))
    # The same moves of the same requests, so that more than the kind of fault comes again.
    assert hit(again) & hit(found)
