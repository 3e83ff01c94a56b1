"""`ares up --simulate`: a whole cluster by command, a request that moves through it, and processes that die."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from ares.free_ports import free_port
from ares.local_cluster import cluster as local
from ares.local_cluster.supervision import Supervisor
from ares.mock_engine import model as mock_model
from tests.gateway.conftest import byte_tokenizer, model_folder  # noqa: F401 - fixtures

pytestmark = pytest.mark.timeout(240)
PROMPT = list(range(10, 60))
TOKENS = 1500
SHORTER = 600


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - our own
    with urllib.request.urlopen(request, timeout=120) as reply:  # noqa: S310 - our own
        return json.load(reply)


def test_a_request_moves_through_a_mock_cluster(model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = local.ClusterSettings(
        model=str(model_folder),
        prefill=1,
        decode=3,
        port=free_port("127.0.0.1"),
        preset="off",
        log_folder=tmp_path,
        simulate="llama-8b-rtx4090",
        vllm_flags=("--speed", "4"),
    )
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
    replies: list[Any] = []
    with local.running(settings, Console(file=io.StringIO())) as cluster:
        client = threading.Thread(target=lambda: replies.append(call(f"{cluster.url}/v1/completions", body)))
        client.start()
        running: list[Any] = []
        while not running:
            running = [r for r in call(f"{cluster.url}/admin/v1/status")["requests"] if r["output_tokens"] > 10]
        targets = [f"decode-{n}" for n in range(3) if f"decode-{n}" != running[0]["instance"]]
        for target in targets:
            move = {"request_id": running[0]["id"], "target": target}
            assert call(f"{cluster.url}/admin/v1/migrations", move)["outcome"] == "moved"
        client.join()
        counters = [call(f"{url}/simulate/counters") for part in cluster.workers for url in part.instances.values()]
    assert replies[0]["choices"][0]["token_ids"] == mock_model.load(model_folder).continuation(PROMPT, TOKENS)
    assert sum(c["cut"] for c in counters) == 2
    assert sum(c["pulls"] for c in counters) == 3
    assert not any(c["kv_blocks_used"] or c["pinned"] for c in counters)


def test_a_stream_outlives_its_worker_which_comes_back(model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = local.ClusterSettings(
        model=str(model_folder),
        port=free_port("127.0.0.1"),
        preset="off",
        log_folder=tmp_path,
        simulate="llama-8b-rtx4090",
        per_process=1,
        vllm_flags=("--speed", "2"),
    )
    body = {"prompt": PROMPT, "max_tokens": SHORTER, "ignore_eos": True, "return_token_ids": True}
    replies: list[Any] = []
    with local.running(settings, Console(file=io.StringIO())) as cluster:
        supervisor = Supervisor(cluster)
        client = threading.Thread(target=lambda: replies.append(call(f"{cluster.url}/v1/completions", body)))
        client.start()

        def status(kind: str) -> dict[str, Any]:
            rows = call(f"{cluster.url}/admin/v1/status")[kind]
            return {row["id" if kind == "requests" else "name"]: row for row in rows}

        running: list[Any] = []
        while not running:
            running = [r for r in status("requests").values() if r["output_tokens"] > 10]
        (dying,) = [part for part in cluster.workers if part.name == running[0]["instance"]]
        boot = call(f"{dying.url}/ares/v1/instance")["boot"]
        os.kill(dying.popen.pid, signal.SIGKILL)
        while "ready again" not in cluster.console.file.getvalue():  # type: ignore[attr-defined]
            supervisor.check()
            time.sleep(0.05)
        assert call(f"{dying.url}/ares/v1/instance")["boot"] != boot
        while not status("instances")[dying.name]["healthy"]:
            time.sleep(0.05)
        # The gateway uses it again: the stream, if it still runs, and another one go there.
        later = threading.Thread(target=lambda: replies.append(call(f"{cluster.url}/v1/completions", body)))
        client.join()
        later.start()
        while not (found := [r for r in status("requests").values() if r["output_tokens"] > 10]):
            time.sleep(0.02)
        if found[0]["instance"] != dying.name:
            order = {"request_id": found[0]["id"], "target": dying.name}
            assert call(f"{cluster.url}/admin/v1/migrations", order)["outcome"] == "moved"
        later.join()
        counters = call(f"{dying.url}/simulate/counters")
    expected = mock_model.load(model_folder).continuation(PROMPT, SHORTER)
    assert [reply["choices"][0]["token_ids"] for reply in replies] == [expected, expected]
    assert counters["arrived"] > 0


class Up:
    """`ares up` as a process, and what it prints to standard error."""

    def __init__(self, folder: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "ares", "up", "--simulate", "llama-8b-rtx4090", "--model", str(folder)]
        command += ["--decode", "1", "--prefill", "0", "--port", str(free_port("127.0.0.1")), *flags]
        self.lines: list[str] = []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()
        assert self.process.stdout is not None
        while "Ctrl-C" not in (line := self.process.stdout.readline()):
            assert line, self.lines

    def __enter__(self) -> "Up":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:  # a test has failed
            self.process.terminate()
        self.process.wait(30)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.strip())

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 60
        while not any(text in line for line in list(self.lines)):
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.02)

    def parts(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def worker(self) -> psutil.Process:
        (found,) = [part for part in self.parts() if "worker" in part.cmdline()]
        return found


def test_ctrl_c_while_a_worker_is_away_ends_everything(model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    with Up(model_folder, "--log-folder", str(tmp_path)) as up:
        every = up.parts()
        assert len(every) == 2
        up.worker().kill()
        up.wait_for("decode starts again (try 1 of 5)")
        every += up.parts()
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(30) == 0
    _, alive = psutil.wait_procs(every, timeout=5)
    assert not alive
