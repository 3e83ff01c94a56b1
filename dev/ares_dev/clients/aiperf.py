"""aiperf: chats, streamed and whole, and completions."""

import json
import subprocess
import sys
from pathlib import Path

from ares_dev.clients.report import Report, Target, expect, main

_RUNS = {
    "chat, streamed": ("chat", "--streaming"),
    "chat": ("chat",),
    "completions, streamed": ("completions", "--streaming"),
    "responses, streamed": ("responses", "--streaming"),
}
_REQUESTS = 6


def run(target: Target, report: Report) -> None:
    """Run the benchmark once for each kind of endpoint."""
    for number, (name, kind) in enumerate(_RUNS.items()):
        with report.check(name, requests=_REQUESTS) as check:
            command = [str(Path(sys.executable).with_name("aiperf")), "profile", "--endpoint-type", *kind]
            command += ["--url", target.url, "--model", target.model, "--tokenizer", target.tokenizer]
            command += ["--request-count", str(_REQUESTS), "--concurrency", "2"]
            command += ["--isl", "32", "--osl", str(target.tokens), "--extra-inputs", "ignore_eos:true"]
            command += ["--output-artifact-dir", str(number), "--ui", "none"]
            command += ["--no-gpu-telemetry", "--no-server-metrics"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the client
            file = Path(str(number)) / "profile_export_aiperf.json"
            expect(file.exists(), f"status {done.returncode}, no result: {(done.stdout + done.stderr)[-400:]}")
            result = json.loads(file.read_text())
            for error in result["error_summary"]:
                check.fail(json.dumps(error["error_details"]), error["count"])
            completed = round((result.get("request_count") or {"avg": 0})["avg"])
            expect(completed + check.failed == _REQUESTS, f"{completed} completed")


if __name__ == "__main__":
    main(run)
