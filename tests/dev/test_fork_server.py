"""Forked instances against what starts them: streams, environment, status, signals, and the end of either."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ares_dev import fork_server
from tests.gateway.conftest import byte_tokenizer, model_folder  # noqa: F401 - fixtures
from tests.integration.namespaces import Network, why_not
from tests.waiting import eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs pidfd_open and PR_SET_PDEATHSIG")


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with fork_server.running(log, os.environ, ["ares.cli.main"]) as found:
        yield found


def started(
    variables: dict[str, str], folder: Path, *words: str, network: Network | None = None, **given: str
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ares_dev.forked_engine", *words]
    with (folder / "log").open("wb") as sink:
        return subprocess.Popen(
            command if network is None else network.command("one", *command),
            cwd=folder,
            env={**os.environ, **variables, **given},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            process_group=0,
        )


class Instance:
    """A mock engine that was started from the server."""

    def __init__(self, variables: dict[str, str], model: Path, folder: Path, network: Network | None = None) -> None:
        words = ["worker", "--simulate", "r1-qwen-7b-24gb", "--model", str(model), "--role", "decode"]
        self.client = started(variables, folder, *words, "--drain-deadline", "3", network=network)
        self.log = folder / "log"

    @property
    def group(self) -> set[int]:
        """The processes of its group, those that have ended left out."""
        return {
            process.pid
            for process in psutil.process_iter(["status"])
            if process.info["status"] != psutil.STATUS_ZOMBIE and pgid(process.pid) == self.client.pid
        }

    async def serving(self) -> int:
        """Wait until it serves, and return its pid."""
        await eventually(lambda: "a mock engine on" in self.log.read_text())
        (pid,) = self.group
        assert pid != self.client.pid
        return pid


def pgid(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def network_of(pid: int) -> int:
    return Path(f"/proc/{pid}/ns/net").stat().st_ino


@pytest.fixture
def instance(variables: dict[str, str], model_folder: Path, tmp_path: Path) -> Iterator[Instance]:  # noqa: F811
    found = Instance(variables, model_folder, tmp_path)
    yield found
    found.client.kill()
    found.client.wait()


def test_status_streams_folder_and_arguments_are_the_clients(variables: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("{")
    client = started(variables, tmp_path, "worker", "--simulate", "own.yaml", "--model", "a/model", "--role", "decode")
    assert client.wait(30) == 2
    assert "own.yaml:1: not JSON" in (tmp_path / "log").read_text()


def test_the_environment_is_the_clients(variables: dict[str, str], tmp_path: Path) -> None:
    client = started(variables, tmp_path, "gateway", "--model", "m", "--worker", "http://x", ARES_PORT="many")
    assert client.wait(30) == 2
    assert "ARES_PORT" in (tmp_path / "log").read_text()


async def test_the_network_is_the_clients(variables: dict[str, str], model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with Network("one") as network:
        instance = Instance(variables, model_folder, tmp_path, network)
        try:
            pid = await instance.serving()
            assert network_of(pid) == network_of(instance.client.pid) != network_of(os.getpid())
        finally:
            instance.client.kill()
            instance.client.wait()


@pytest.mark.parametrize("to_group", [True, False])
async def test_a_signal_arrives_once(instance: Instance, *, to_group: bool) -> None:
    await instance.serving()
    (os.killpg if to_group else os.kill)(instance.client.pid, signal.SIGTERM)
    assert await asyncio.to_thread(instance.client.wait, 30) == 0
    # A second one would have ended the drain.
    assert instance.log.read_text().count("SIGTERM: draining") == 1
    assert "drained" in instance.log.read_text()
    assert not instance.group


async def test_a_killed_client_takes_its_instance_with_it(instance: Instance) -> None:
    pid = await instance.serving()
    instance.client.kill()
    await eventually(lambda: not psutil.pid_exists(pid))
    assert instance.client.wait(30) == -signal.SIGKILL


async def test_a_killed_instance_ends_its_client_in_the_same_way(instance: Instance) -> None:
    pid = await instance.serving()
    os.kill(pid, signal.SIGKILL)
    assert await asyncio.to_thread(instance.client.wait, 30) == -signal.SIGKILL


async def test_stopping_the_group_stops_the_instance(instance: Instance) -> None:
    pid = await instance.serving()
    os.killpg(instance.client.pid, signal.SIGSTOP)
    await eventually(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    os.killpg(instance.client.pid, signal.SIGCONT)
    await eventually(lambda: psutil.Process(pid).status() != psutil.STATUS_STOPPED)
