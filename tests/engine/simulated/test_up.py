"""`ares up --simulate`: a whole cluster by command, and a request that moves through it."""

import io
import json
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ares import local
from ares.engine.defaults import free_port
from ares.engine.simulated import model as simulated
from tests.gateway.conftest import byte_tokenizer, model_folder  # noqa: F401 - fixtures

pytestmark = pytest.mark.timeout(240)
PROMPT = list(range(10, 60))
TOKENS = 1500


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - our own
    with urllib.request.urlopen(request, timeout=120) as reply:  # noqa: S310 - our own
        return json.load(reply)


def test_a_request_moves_through_a_simulated_cluster(model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = local.ClusterSettings(
        model=str(model_folder),
        prefill=1,
        decode=3,
        port=free_port("127.0.0.1"),
        preset="off",
        log_folder=tmp_path,
        simulate="llama-8b-rtx4090",
        vllm_flags=("--speed", "2"),
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
    assert replies[0]["choices"][0]["token_ids"] == simulated.load(model_folder).continuation(PROMPT, TOKENS)
    assert sum(c["cut"] for c in counters) == 2
    assert sum(c["pulls"] for c in counters) == 3
    assert not any(c["kv_blocks_used"] or c["pinned"] for c in counters)
