"""`vllm bench serve`: its backends for chats and completions."""

import json
import subprocess
import sys
from pathlib import Path

from ares_dev.clients.report import Report, Target, expect, main

# What `vllm bench serve` runs: the `vllm` command itself cannot start in the CPU build, whose distribution has another
# name.
BENCH_SERVE = """
import json, sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args(json.loads(sys.argv[1])))
"""
_ENDPOINTS = {"openai-chat": "/v1/chat/completions", "openai": "/v1/completions"}
_REQUESTS = 8


def run(target: Target, report: Report) -> None:
    """Run the benchmark once for each backend."""
    for backend, endpoint in _ENDPOINTS.items():
        with report.check(backend, requests=_REQUESTS) as check:
            arguments = ["--backend", backend, "--endpoint", endpoint, "--base-url", target.url]
            arguments += ["--model", target.model, "--tokenizer", target.tokenizer, "--num-prompts", str(_REQUESTS)]
            arguments += ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len"]
            arguments += [str(target.tokens), "--max-concurrency", "2", "--ignore-eos", "--disable-tqdm"]
            arguments += ["--save-result", "--save-detailed", "--result-filename", f"{backend}.json"]
            done = subprocess.run(  # noqa: S603 - the client
                [sys.executable, "-c", BENCH_SERVE, json.dumps(arguments)], capture_output=True, text=True, check=False
            )
            expect(done.returncode == 0, f"status {done.returncode}: {done.stderr[-400:]}")
            result = json.loads(Path(f"{backend}.json").read_text())
            for error in filter(None, result["errors"]):
                check.fail(error)
            expect(result["completed"] + check.failed == _REQUESTS, f"{result['completed']} completed")
            tokens = result["total_output_tokens"]
            expect(bool(check.failed) or tokens == _REQUESTS * target.tokens, f"{tokens} output tokens")


if __name__ == "__main__":
    main(run)
