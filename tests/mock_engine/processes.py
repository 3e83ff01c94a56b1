"""Mock instances as processes of their own, and a gateway over them."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ares.config import GatewayConfig
from ares.free_ports import free_ports
from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool.delta import Delta
from ares.gateway.service import Gateway
from ares.gateway.tuning import DEFAULT, Tuning
from tests.waiting import eventually


class Workers:
    """Processes of one mock instance each; where some prefill, the others decode."""

    def __init__(self, folder: Path, count: int, *flags: str, prefill: int = 0) -> None:
        self.folder = folder
        self.roles = ["prefill"] * prefill + ["decode" if prefill else "both"] * (count - prefill)
        self.ports = range(first := free_ports("127.0.0.1", count), first + count)
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        for port in self.ports:
            self.start(port, *flags)

    def start(self, port: int, *flags: str) -> subprocess.Popen[bytes]:
        command = ["worker", "--simulate", "llama-8b-rtx4090", "--model", str(self.folder)]
        command += ["--role", self.roles[self.ports.index(port)]]
        command += ["--name", f"w{port}", "--port", str(port), *flags, "--", "--prediction-error", "none"]
        process = self.processes[port] = subprocess.Popen([sys.executable, "-m", "ares", *command])
        return process

    async def ended(self, port: int) -> int:
        return await asyncio.to_thread(self.processes[port].wait, 120)

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@contextlib.contextmanager
def workers(folder: Path, count: int, *flags: str, prefill: int = 0) -> Iterator[Workers]:
    made = Workers(folder, count, *flags, prefill=prefill)
    try:
        yield made
    finally:
        made.kill()


@contextlib.asynccontextmanager
async def gateway_over(made: Workers, folder: Path, tuning: Tuning = DEFAULT) -> Any:
    urls = [f"http://127.0.0.1:{port}" for port in made.ports]
    gateway = Gateway(GatewayConfig(model="some/model", workers=urls, preset="off"), folder, tuning)
    await gateway.start()
    try:
        await eventually(lambda: all(i.open for i in gateway.pool.instances), 120)
        yield gateway
    finally:
        await gateway.stop()


async def generate(gateway: Gateway, name: str, prompt: list[int], count: int) -> list[int]:
    tokens: list[int] = []

    async def emit(batch: list[Delta]) -> bool:
        tokens.extend(token for delta in batch for token in delta.token_ids or [])
        return False

    await gateway.generate(name, prompt, Sampling({"ignore_eos": True}, count), emit)
    return tokens
