"""What a gateway takes that does nothing: memory, and which libraries it has loaded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# The command itself, but for listening: it starts the gateway, waits, and says what has been loaded.
SCRIPT = """
import asyncio, json, sys
import psutil
from ares.cli import main as cli
from ares.gateway.http import server

def run(self):
    async def idle():
        gateway = self._app.state.gateway
        await gateway.start()
        await asyncio.sleep(0.5)
        await gateway.stop()
    asyncio.run(idle())
    print(json.dumps({"modules": sorted(sys.modules), "rss_mb": psutil.Process().memory_info().rss / 2**20}))

server.Server.run = run
cli.main()
"""
HEAVY = {"torch", "transformers", "vllm", "matplotlib"}


def idle(model_folder: Path, preset: str) -> dict[str, Any]:
    flags = ["gateway", "--model", str(model_folder), "--worker", "http://127.0.0.1:1", "--port", "0"]
    command = [sys.executable, "-c", SCRIPT, *flags, "--preset", preset]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("preset", ["off", "static-rr", "static-least-loaded"])
def test_a_plain_router(model_folder: Path, preset: str) -> None:
    found = idle(model_folder, preset)
    assert not {*found["modules"]} & {*HEAVY, "numba", "llvmlite", "scipy"}
    assert found["rss_mb"] < 150


@pytest.mark.timeout(240)
@pytest.mark.parametrize("preset", ["ares", "llumnix"])
def test_a_preset_that_looks_ahead(model_folder: Path, preset: str) -> None:
    found = idle(model_folder, preset)
    assert not {*found["modules"]} & HEAVY
    assert found["rss_mb"] < 250
