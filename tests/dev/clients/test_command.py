"""The command on mock engines: what works there succeeds, and what needs a model or a parser is reported as failed."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ares.free_ports import free_port
from ares.local_cluster import cluster as local
from tests.gateway.conftest import byte_tokenizer, model_folder  # noqa: F401 - fixtures

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def cluster(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.Cluster]:  # noqa: F811
    settings = local.ClusterSettings(
        model=str(model_folder),
        port=free_port("127.0.0.1"),
        preset="off",
        log_folder=tmp_path_factory.mktemp("logs"),
        simulate="llama-8b-rtx4090",
        vllm_flags=("--speed", "20"),
    )
    with local.running(settings, Console(file=io.StringIO())) as started:
        yield started


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "ares_dev", "clients", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=100, check=False)


def failed(row: dict[str, Any]) -> set[str]:
    return {check["name"] for check in row["checks"] if check["failed"]}


def test_clients_on_mock_engines(cluster: local.Cluster, tmp_path: Path) -> None:
    file = tmp_path / "clients.json"
    chosen = ["--client", "openai", "--client", "open-webui", "--json", str(file)]
    done = command("--url", cluster.url, "--model", cluster.settings.model, "--tokens", "4", *chosen)
    assert done.returncode == 1, done.stderr
    result = json.loads(file.read_text())
    assert list(result["clients"]) == ["openai", "open-webui"]
    assert set(result["gateway"]["instances"]) == {"prefill-0", "decode-0", "decode-1"}

    # Random words are neither calls nor objects, and without a tool parser the gateway refuses tool_choice auto.
    row = result["clients"]["openai"]
    assert row["requests"] > 25
    for name in failed(row):
        assert "tool" in name or "parsed" in name, row["failures"]
    assert {"chat with a tool, tool_choice required", "chat, parsed output"} <= failed(row)
    assert row["tool_calls"]["parsed"] == 0
    assert row["failed"] == len(failed(row))

    row = result["clients"]["open-webui"]
    assert (row["requests"], row["failed"]) == (9, 2)
    assert failed(row) == {"chat with a tool", "chat with the result of a tool"}
    assert "--enable-auto-tool-choice" in row["failures"][0]
    for shown in ("openai", "open-webui", row["version"], row["failures"][0][:40]):
        assert shown in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--client": "netscape"}, "netscape"),
        ({"--model": "no-such-model"}, "the gateway serves"),
        ({"--url": "http://127.0.0.1:9"}, "http://127.0.0.1:9/version"),
    ],
)
def test_an_error_of_the_user_is_named(cluster: local.Cluster, change: dict[str, str], message: str) -> None:
    given = {"--url": cluster.url, "--model": cluster.settings.model, **change}
    done = command(*(word for pair in given.items() for word in pair))
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
