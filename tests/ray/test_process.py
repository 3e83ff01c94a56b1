"""The process of an instance, as its actor starts and ends it."""

import asyncio
import sys
from pathlib import Path

import psutil
import pytest

from ares.free_ports import free_ports
from ares.ray.process import InstanceProcess, ProcessError
from tests.gateway.conftest import byte_tokenizer, model_folder  # noqa: F401 - fixtures
from tests.waiting import eventually

HOST = "127.0.0.1"


def arguments(folder: Path, port: int, *more: str) -> list[str]:
    given = ["worker", "--simulate", "llama-8b-rtx4090", "--role", "decode", "--model", str(folder), "--name", "d"]
    return [*given, "--port", str(port), *more]


@pytest.fixture
def port() -> int:
    return free_ports(HOST, 1)


async def test_it_runs_until_it_is_stopped(model_folder: Path, port: int) -> None:  # noqa: F811
    process = InstanceProcess(arguments(model_folder, port), f"http://{HOST}:{port}")
    await process.await_ready(60)
    process.check()
    await process.stop(60)
    with pytest.raises(ProcessError, match="ended with status 0"):
        process.check()


async def test_one_that_cannot_start_says_why(
    model_folder: Path,  # noqa: F811
    port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (tmp_path / "errors").open("w") as errors:
        errors.write("what the actor has written before\n")
        errors.flush()
        monkeypatch.setattr(sys, "stderr", errors)
        process = InstanceProcess(arguments(model_folder, port, "--no-such-flag"), f"http://{HOST}:{port}")
        with pytest.raises(ProcessError, match=r"(?s)ended with status 2;.*--no-such-flag") as caught:
            await process.await_ready(60)
    assert "before" not in str(caught.value)


async def test_one_that_does_not_answer_is_killed(model_folder: Path, port: int) -> None:  # noqa: F811
    process = InstanceProcess(arguments(model_folder, port), "http://127.0.0.1:9")
    with pytest.raises(ProcessError, match=r"not ready after 0\.5 s \(start_timeout_s\)"):
        await process.await_ready(0.5)
    assert not psutil.pid_exists(process.pid)


async def test_it_does_not_outlive_an_actor_that_is_killed(model_folder: Path, port: int) -> None:  # noqa: F811
    code = (
        "import sys, time; from ares.ray.process import InstanceProcess\n"
        f"print(InstanceProcess({arguments(model_folder, port)!r}, '').pid, flush=True); time.sleep(600)"
    )
    actor = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert actor.stdout is not None
    instance = psutil.Process(int(await actor.stdout.readline()))
    actor.kill()
    await actor.wait()
    await eventually(lambda: not instance.is_running() or instance.status() == psutil.STATUS_ZOMBIE, 60)
