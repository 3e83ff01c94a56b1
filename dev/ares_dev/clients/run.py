"""Running the script of one client in a process of its own, with a time limit, and reading its report."""

import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ares_dev
from ares_dev.clients.report import ANSWERED, PARSED, Check, Target
from ares_dev.clients.table import Client

# Failures that are shown for each client.
_FAILURES = 5
_LAST_CHARACTERS = 600


def run(client: Client, target: Target, environments: Path | None, limit_s: float) -> dict[str, Any]:
    """Run a client against the gateway and return its row of the result.

    Parameters
    ----------
    client
        One of the table.
    target
        The gateway.
    environments
        Folder of virtual environments, each with the name of a client.
    limit_s
        The process is killed after this many seconds; what it had reported until then counts, and one failure more.
    """
    python = client.python(environments)
    version = client.version(python)
    if version is None:
        return {"installed": False, "install": client.install}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        began = time.monotonic()
        ended = _process([python, "-m", client.module, json.dumps(asdict(target)), str(report)], Path(folder), limit_s)
        seconds = time.monotonic() - began
        lines = report.read_text().splitlines() if report.exists() else []
    checks = [Check(**json.loads(line)) for line in lines]
    if ended is not None:
        checks.append(Check("the script", requests=0, failed=1, errors=[ended]))
    return {"installed": True, "version": version, "seconds": round(seconds, 1), **figures(checks)}


def figures(checks: list[Check]) -> dict[str, Any]:
    """Return the sums over the checks of a client, and each check."""
    failures = [f"{check.name}: {error}" for check in checks for error in check.errors]
    calls = [check.tool_call for check in checks if check.tool_call]
    return {
        "requests": sum(check.requests for check in checks),
        "failed": sum(check.failed for check in checks),
        "failures": failures[:_FAILURES],
        "tool_calls": {"parsed": calls.count(PARSED), "answered_in_text": calls.count(ANSWERED)},
        "checks": [
            {"name": check.name, "requests": check.requests, "failed": check.failed}
            | ({"tool_call": check.tool_call} if check.tool_call else {})
            for check in checks
        ],
    }


def _process(command: list[str], folder: Path, limit_s: float) -> str | None:
    """Run a process, with all that it starts, in an empty folder; return why it did not end well, or None."""
    # Of this project the process imports ares_dev alone: its Python has the client's packages, not ours.
    environment = {**os.environ, "PYTHONPATH": str(Path(ares_dev.__file__).parents[1])}
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(  # noqa: S603 - a script of this package
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"not done after {limit_s:g} s"
        finally:
            _kill_group(process)
        if status == 0:
            return None
        output.seek(0)
        return f"ended with status {status}: {output.read()[-_LAST_CHARACTERS:]}"


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of a process and its children: a stopped benchmark leaves its workers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
