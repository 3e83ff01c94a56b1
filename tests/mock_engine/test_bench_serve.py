"""vLLM's own benchmark client, unmodified, against a cluster of mock engines."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ares.free_ports import free_port
from ares.local_cluster import cluster as local
from tests.gateway.conftest import byte_tokenizer, model_folder  # noqa: F401 - fixtures

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = pytest.mark.timeout(240)

REQUESTS, TOKENS = 12, 32
# What `vllm bench serve` runs, once for each list of arguments: the `vllm` command itself cannot start in the CPU
# build, whose distribution has another name.
BENCH_SERVE = """
import json, sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
for arguments in json.loads(sys.argv[1]):
    main(parser.parse_args(arguments))
"""
ENDPOINTS = {"openai-chat": "/v1/chat/completions", "openai": "/v1/completions", "vllm": "/v1/completions"}


def test_vllm_bench_serve_runs_unmodified(model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = local.ClusterSettings(
        model=str(model_folder),
        port=free_port("127.0.0.1"),
        preset="off",
        log_folder=tmp_path,
        simulate="llama-8b-rtx4090",
        vllm_flags=("--speed", "10"),
    )
    with local.running(settings, Console(file=io.StringIO())) as cluster:
        common = ["--base-url", cluster.url, "--model", str(model_folder), "--num-prompts", str(REQUESTS)]
        common += ["--dataset-name", "random", "--random-input-len", "64", "--random-output-len", str(TOKENS)]
        common += ["--ignore-eos", "--disable-tqdm", "--save-result", "--result-dir", str(tmp_path)]
        runs = [
            ["--backend", backend, "--endpoint", endpoint, "--result-filename", f"{backend}.json", *common]
            for backend, endpoint in ENDPOINTS.items()
        ]
        command = [sys.executable, "-c", BENCH_SERVE, json.dumps(runs)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for backend in ENDPOINTS:
        result = json.loads((tmp_path / f"{backend}.json").read_text())
        found = (result["completed"], result["failed"], result["total_output_tokens"])
        assert found == (REQUESTS, 0, REQUESTS * TOKENS), backend
